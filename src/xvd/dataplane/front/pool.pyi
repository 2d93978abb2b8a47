# Only for Cython: pool.pxd.
