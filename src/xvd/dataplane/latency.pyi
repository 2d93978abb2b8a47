# Only for Cython: latency.pxd.
