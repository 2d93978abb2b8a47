/* SPDX-License-Identifier: Apache-2.0
 *
 * The only inline C: loads, stores and fences on memory that another domain writes at the same
 * time, and the one copy out of it. Everything else reads private memory.
 */
#ifndef XVD_ATOMICS_H
#define XVD_ATOMICS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* An index published by the peer: what it wrote before the index is visible after this load. */
static inline uint32_t xvd_load_acquire(const void *p)
{
	return __atomic_load_n((const uint32_t *)p, __ATOMIC_ACQUIRE);
}

/* Publish an index: the peer that reads it sees the entries written before. */
static inline void xvd_store_release(void *p, uint32_t v)
{
	__atomic_store_n((uint32_t *)p, v, __ATOMIC_RELEASE);
}

static inline void xvd_store_relaxed(void *p, uint32_t v)
{
	__atomic_store_n((uint32_t *)p, v, __ATOMIC_RELAXED);
}

/* The same for the 16-bit indices of a virtqueue. */
static inline uint16_t xvd_load16_acquire(const void *p)
{
	return __atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE);
}

static inline void xvd_store16_release(void *p, uint16_t v)
{
	__atomic_store_n((uint16_t *)p, v, __ATOMIC_RELEASE);
}

/* Between publishing our index and reading the peer's event index (and the other way round):
 * every CPU, x86 included, may move the later load above the earlier store; the wake-up that
 * both sides then believe unnecessary is lost. */
static inline void xvd_fence(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static inline uint32_t xvd_exchange32(void *p, uint32_t v)
{
	return __atomic_exchange_n((uint32_t *)p, v, __ATOMIC_SEQ_CST);
}

/* Take bits away that another thread may be taking others from. */
static inline void xvd_clear_bits(void *p, uint32_t bits)
{
	__atomic_fetch_and((uint32_t *)p, ~bits, __ATOMIC_RELAXED);
}

/* Add bits where other threads add and take away others; those before. The order is that of all
 * such. */
static inline uint64_t xvd_set_bits64(void *p, uint64_t bits)
{
	return __atomic_fetch_or((uint64_t *)p, bits, __ATOMIC_SEQ_CST);
}

static inline void xvd_clear_bits64(void *p, uint64_t bits)
{
	__atomic_fetch_and((uint64_t *)p, ~bits, __ATOMIC_SEQ_CST);
}

static inline int xvd_cas32(void *p, uint32_t old, uint32_t v)
{
	return __atomic_compare_exchange_n((uint32_t *)p, &old, v, 0, __ATOMIC_SEQ_CST,
					   __ATOMIC_SEQ_CST);
}

static inline int xvd_cas64(void *p, uint64_t old, uint64_t v)
{
	return __atomic_compare_exchange_n((uint64_t *)p, &old, v, 0, __ATOMIC_SEQ_CST,
					   __ATOMIC_SEQ_CST);
}

static inline uint64_t xvd_load64(const void *p)
{
	return __atomic_load_n((const uint64_t *)p, __ATOMIC_ACQUIRE);
}

static inline void xvd_store64(void *p, uint64_t v)
{
	__atomic_store_n((uint64_t *)p, v, __ATOMIC_RELEASE);
}

/* Count something that several threads count; the sum before. Modulo 2^64: to add -n takes n. */
static inline uint64_t xvd_add64(void *p, uint64_t v)
{
	return __atomic_fetch_add((uint64_t *)p, v, __ATOMIC_SEQ_CST);
}

static inline void xvd_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#endif
}

/* Copy one ring entry to private memory. Each word is loaded exactly once, by a load that the
 * compiler may neither repeat nor drop: the peer may rewrite the entry while we look (XSA-155).
 * Entries are 4-aligned in every ABI and a multiple of 4 long. */
static inline void xvd_copy_slot(void *private_copy, const void *shared, uint32_t bytes)
{
	const uint32_t *from = (const uint32_t *)shared;
	uint32_t *to = (uint32_t *)private_copy;

	for (uint32_t i = 0; i < bytes / 4; i++)
		to[i] = __atomic_load_n(from + i, __ATOMIC_RELAXED);
}

/* Whether memory that the peer may be writing to holds nothing but zeros. Each byte is loaded exactly
 * once, as by a copy of which this tells. Looked at twice, memory that was never all zeros could pass:
 * what was seen may change while the rest is looked at. */
static inline int xvd_is_zero(const void *shared, size_t bytes)
{
	const uint8_t *at = (const uint8_t *)shared, *end = at + bytes;
	uint64_t found = 0;

	for (; at < end && (uintptr_t)at % 8; at++)
		found |= __atomic_load_n(at, __ATOMIC_RELAXED);
	for (; end - at >= 64 && !found; at += 64)
		for (uint32_t i = 0; i < 64; i += 8)
			found |= __atomic_load_n((const uint64_t *)(at + i), __ATOMIC_RELAXED);
	for (; at < end && !found; at++)
		found |= __atomic_load_n(at, __ATOMIC_RELAXED);
	return !found;
}

/* Fields of a private copy: unaligned in the 32-bit ABI, so by memcpy. */
static inline uint16_t xvd_get16(const void *p) { uint16_t v; memcpy(&v, p, 2); return v; }
static inline uint32_t xvd_get32(const void *p) { uint32_t v; memcpy(&v, p, 4); return v; }
static inline uint64_t xvd_get64(const void *p) { uint64_t v; memcpy(&v, p, 8); return v; }
static inline void xvd_put16(void *p, uint16_t v) { memcpy(p, &v, 2); }
static inline void xvd_put32(void *p, uint32_t v) { memcpy(p, &v, 4); }
static inline void xvd_put64(void *p, uint64_t v) { memcpy(p, &v, 8); }

/* The system's clock that never goes back. */
static inline uint64_t xvd_monotonic_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* For our own mistakes only; never for what a peer can cause. */
#if XVD_DEBUG
#define DEBUG_ASSERT(cond)                                                                     \
	do {                                                                                   \
		if (!(cond)) {                                                                 \
			fprintf(stderr, "xvd: assertion failed: %s:%d: %s\n", __FILE__,        \
				__LINE__, #cond);                                              \
			abort();                                                               \
		}                                                                              \
	} while (0)
#else
#define DEBUG_ASSERT(cond) ((void)0)
#endif

#endif
