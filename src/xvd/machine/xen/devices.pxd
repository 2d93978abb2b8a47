# SPDX-License-Identifier: Apache-2.0
"""Declarations of devices.h; see it for what each thing means."""

from libc.stdint cimport int16_t, uint16_t, uint32_t, uint64_t


cdef extern from "devices.h" nogil:
    cdef struct xvd_grant_ref:
        uint32_t domid
        uint32_t gref

    cdef struct xvd_map_grants:
        uint32_t count
        uint64_t index
        xvd_grant_ref *refs

    cdef struct xvd_unmap_grants:
        uint64_t index
        uint32_t count
        uint32_t pad

    cdef struct xvd_copy_foreign:
        uint32_t gref
        uint16_t offset
        uint16_t domid

    cdef union xvd_copy_side:
        void *local
        xvd_copy_foreign foreign

    cdef struct xvd_copy_segment:
        xvd_copy_side source
        xvd_copy_side dest
        uint16_t size
        uint16_t flags
        int16_t status

    cdef struct xvd_copy_grants:
        uint32_t count
        xvd_copy_segment *segments

    cdef struct xvd_alloc_grants:
        uint16_t domid
        uint16_t flags
        uint32_t count
        uint64_t index
        uint32_t *grefs

    cdef struct xvd_bind_interdomain:
        uint32_t remote_domain
        uint32_t remote_port

    const unsigned long XVD_GNTDEV_MAP
    const unsigned long XVD_GNTDEV_UNMAP
    const unsigned long XVD_GNTDEV_COPY
    const unsigned long XVD_GNTALLOC_ALLOC
    const unsigned long XVD_GNTALLOC_DEALLOC
    const unsigned long XVD_EVTCHN_BIND_INTERDOMAIN
    const unsigned long XVD_EVTCHN_BIND_UNBOUND
    const unsigned long XVD_EVTCHN_NOTIFY
    const unsigned long XVD_EVTCHN_RESTRICT
    const uint16_t XVD_COPY_SOURCE_GREF
    const uint16_t XVD_COPY_DEST_GREF


cdef extern from "sys/ioctl.h" nogil:
    int ioctl(int fd, unsigned long request, void *argument)
