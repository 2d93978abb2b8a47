# SPDX-License-Identifier: Apache-2.0
"""Declarations of our C header; see there for what each means."""

from libc.stdint cimport int16_t, uint16_t, uint32_t, uint64_t


cdef extern from "atomics.h" nogil:
    uint32_t xvd_load_acquire(const void *p)
    void xvd_store_release(void *p, uint32_t v)
    uint16_t xvd_load16_acquire(const void *p)
    void xvd_store16_release(void *p, uint16_t v)
    void xvd_store_relaxed(void *p, uint32_t v)
    void xvd_fence()
    uint32_t xvd_exchange32(void *p, uint32_t v)
    void xvd_clear_bits(void *p, uint32_t bits)
    uint64_t xvd_set_bits64(void *p, uint64_t bits)
    void xvd_clear_bits64(void *p, uint64_t bits)
    bint xvd_cas32(void *p, uint32_t old, uint32_t v)
    bint xvd_cas64(void *p, uint64_t old, uint64_t v)
    uint64_t xvd_load64(const void *p)
    void xvd_store64(void *p, uint64_t v)
    uint64_t xvd_add64(void *p, uint64_t v)
    void xvd_pause()
    void xvd_copy_slot(void *private_copy, const void *shared, uint32_t size)
    bint xvd_is_zero(const void *shared, size_t size)
    uint16_t xvd_get16(const void *p)
    uint32_t xvd_get32(const void *p)
    uint64_t xvd_get64(const void *p)
    void xvd_put16(void *p, uint16_t v)
    void xvd_put32(void *p, uint32_t v)
    void xvd_put64(void *p, uint64_t v)
    uint64_t monotonic_ns "xvd_monotonic_ns"()
    void DEBUG_ASSERT(bint condition)
    const bint XVD_DEBUG
