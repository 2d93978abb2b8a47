# Only for Cython: space.pxd.
