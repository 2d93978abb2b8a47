# Only for Cython: ports.pxd.
