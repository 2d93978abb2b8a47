/* SPDX-License-Identifier: Apache-2.0
 *
 * The limit: what a block ring between two threads costs when nothing is done but the work itself.
 *
 * One ring page in the x86_64 layout of blkif.h, read and written by the ring protocol with its
 * event counters; the frontend copies between the caller's buffer and a shared page, the backend
 * between the shared page and a store in memory; the two wake each other by eventfd, or poll. No
 * negotiation, no check of the peer, one request size, grants looked up in an array. Whatever a
 * block driver does, it does this.
 *
 *     probe [-n operations] [-d depth] [-b bytes] [-w percent-written] [-s span-bytes] [-r seed]
 *           [-p] (poll, never sleep)  [-z] (null: the backend copies nothing)
 *
 * Prints one line of JSON. The checksum is of what was read, as `xvd bench` takes it.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, SECTOR = 512, SEGMENTS = 11, SLOTS = 32, READ_OP = 0, WRITE_OP = 1 };

struct segment { uint32_t gref; uint8_t first, last; };
struct request {
    uint8_t op, nr_segments;
    uint16_t handle;
    uint64_t id, sector;
    struct segment seg[SEGMENTS];
};
struct response { uint64_t id; uint8_t op; int16_t status; };
union slot { struct request req; struct response rsp; };
struct ring {
    _Atomic uint32_t req_prod, req_event, rsp_prod, rsp_event;
    uint8_t pad[48];
    union slot slot[SLOTS];
};
_Static_assert(sizeof(union slot) == 112 && sizeof(struct ring) <= PAGE, "blkif.h's layout");

static struct ring *ring;
static uint8_t *pages, *store, *data;
static uint64_t operations = 1000000, span = 256 << 20, seed = 1;
static uint32_t depth = 32, size = 4096, write_percent;
static int polled, null, to_back, to_front;
static volatile int ended;

static uint64_t now_ns(clockid_t clock)
{
    struct timespec ts;
    clock_gettime(clock, &ts);
    return ts.tv_sec * 1000000000ull + ts.tv_nsec;
}

static void ring_bell(int fd)
{
    uint64_t one = 1;
    if (write(fd, &one, 8) != 8) abort();
}

/* Publish, and tell the peer if it asked to be told of one of the new entries. */
static void push(_Atomic uint32_t *prod, _Atomic uint32_t *event, uint32_t new, int fd)
{
    uint32_t old = atomic_load_explicit(prod, memory_order_relaxed);
    if (old == new) return;
    atomic_store_explicit(prod, new, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    uint32_t wanted = atomic_load_explicit(event, memory_order_relaxed);
    if (!polled && new - wanted < new - old) ring_bell(fd);
}

/* Sleep until the producer has passed `cons`. */
static void await(_Atomic uint32_t *prod, _Atomic uint32_t *event, uint32_t cons, int fd)
{
    uint64_t count;
    if (polled) { __builtin_ia32_pause(); return; }
    atomic_store(event, cons + 1);
    if (atomic_load(prod) == cons && !ended && read(fd, &count, 8) != 8) abort();
}

static void serve_one(const struct request *rq, union slot *slot)
{
    uint64_t at = rq->sector * SECTOR;
    for (uint32_t i = 0; i < rq->nr_segments && !null; i++) {
        uint32_t first = rq->seg[i].first * SECTOR, n = (rq->seg[i].last + 1) * SECTOR - first;
        uint8_t *page = pages + (size_t)rq->seg[i].gref * PAGE + first;
        if (rq->op == READ_OP) memcpy(page, store + at, n);
        else memcpy(store + at, page, n);
        at += n;
    }
    slot->rsp = (struct response){ .id = rq->id, .op = rq->op };
}

static void *backend(void *cpu_ns)
{
    uint32_t cons = 0;
    struct request rq;
    while (!ended) {
        uint32_t prod = atomic_load_explicit(&ring->req_prod, memory_order_acquire);
        if (cons == prod) { await(&ring->req_prod, &ring->req_event, cons, to_back); continue; }
        for (; cons != prod; cons++) {
            memcpy(&rq, &ring->slot[cons % SLOTS].req, sizeof rq);
            serve_one(&rq, &ring->slot[cons % SLOTS]);
        }
        push(&ring->rsp_prod, &ring->rsp_event, cons, to_front);
    }
    *(uint64_t *)cpu_ns = now_ns(CLOCK_THREAD_CPUTIME_ID);
    return NULL;
}

static uint64_t draw(void)
{
    seed ^= seed >> 12;
    seed ^= seed << 25;
    seed ^= seed >> 27;
    return seed * 0x2545F4914F6CDD1D;
}

static void start(struct request *shadow, uint32_t id, uint32_t prod)
{
    struct request *rq = &ring->slot[prod % SLOTS].req;
    uint32_t left = size / SECTOR;
    shadow->op = (draw() >> 32) % 100 < write_percent ? WRITE_OP : READ_OP;
    shadow->sector = (draw() >> 11) % (span / size) * (size / SECTOR);
    shadow->id = id;
    shadow->nr_segments = (size + PAGE - 1) / PAGE;
    for (uint32_t i = 0; i < shadow->nr_segments; i++) {
        uint32_t n = left < 8 ? left : 8;
        shadow->seg[i] = (struct segment){ id * SEGMENTS + i, 0, n - 1 };
        left -= n;
    }
    if (shadow->op == WRITE_OP)
        memcpy(pages + (size_t)id * SEGMENTS * PAGE, data + (size_t)id * size, size);
    *rq = *shadow;
}

static uint64_t frontend(void)
{
    static struct request shadow[SLOTS];
    uint32_t prod = 0, cons = 0;
    uint64_t started = 0, done = 0, checksum = 0;
    for (uint32_t id = 0; id < depth && started < operations; id++, started++)
        start(&shadow[id], id, prod++);
    push(&ring->req_prod, &ring->req_event, prod, to_back);
    while (done < operations) {
        uint32_t seen = atomic_load_explicit(&ring->rsp_prod, memory_order_acquire);
        if (cons == seen) { await(&ring->rsp_prod, &ring->rsp_event, cons, to_front); continue; }
        for (; cons != seen; cons++, done++) {
            struct response rsp = ring->slot[cons % SLOTS].rsp;
            uint8_t *buffer = data + (size_t)rsp.id * size;
            if (rsp.status || rsp.id >= depth) abort();
            if (rsp.op == READ_OP)
                memcpy(buffer, pages + (size_t)rsp.id * SEGMENTS * PAGE, size);
            checksum += *(uint64_t *)buffer;
            if (started < operations) { start(&shadow[rsp.id], rsp.id, prod++); started++; }
        }
        push(&ring->req_prod, &ring->req_event, prod, to_back);
    }
    return checksum;
}

static void *shared(size_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) { perror("probe: mmap"); exit(1); }
    return at;
}

static void parse(int argc, char **argv)
{
    int option;
    while ((option = getopt(argc, argv, "n:d:b:w:s:r:pz")) != -1)
        switch (option) {
        case 'n': operations = strtoull(optarg, NULL, 0); break;
        case 'd': depth = strtoul(optarg, NULL, 0); break;
        case 'b': size = strtoul(optarg, NULL, 0); break;
        case 'w': write_percent = strtoul(optarg, NULL, 0); break;
        case 's': span = strtoull(optarg, NULL, 0); break;
        case 'r': seed = strtoull(optarg, NULL, 0); break;
        case 'p': polled = 1; break;
        case 'z': null = 1; break;
        default: exit(2);
        }
    if (!operations || !seed || !depth || depth > SLOTS || !size || size % SECTOR ||
        size > SEGMENTS * PAGE || span < size) {
        fprintf(stderr, "probe: depth 1 to 32, bytes a multiple of 512 up to 45056\n");
        exit(2);
    }
}

int main(int argc, char **argv)
{
    pthread_t thread;
    uint64_t back_ns = 0, front_ns, begun, ns, checksum;
    parse(argc, argv);
    ring = shared(PAGE);
    pages = shared((size_t)SLOTS * SEGMENTS * PAGE);
    /* Private, as the memory engine's store and a caller's buffers are: huge pages alike. */
    store = mmap(NULL, span, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    data = malloc((size_t)depth * size);
    for (size_t i = 0; i < (size_t)depth * size / 8; i++) ((uint64_t *)data)[i] = draw();
    for (size_t at = 0; at < span && !null; at += 8) *(uint64_t *)(store + at) = at;
    to_back = eventfd(0, 0);
    to_front = eventfd(0, 0);
    atomic_store(&ring->req_event, 1);
    atomic_store(&ring->rsp_event, 1);
    begun = now_ns(CLOCK_MONOTONIC);
    front_ns = now_ns(CLOCK_THREAD_CPUTIME_ID);
    pthread_create(&thread, NULL, backend, &back_ns);
    checksum = frontend();
    ns = now_ns(CLOCK_MONOTONIC) - begun;
    front_ns = now_ns(CLOCK_THREAD_CPUTIME_ID) - front_ns;
    ended = 1;
    ring_bell(to_back);
    pthread_join(thread, NULL);
    printf("{\"operations\": %llu, \"seconds\": %.6f, \"iops\": %.0f, \"front_ns\": %.1f, "
           "\"back_ns\": %.1f, \"checksum\": \"%016llx\"}\n",
           (unsigned long long)operations, ns / 1e9, operations * 1e9 / ns,
           (double)front_ns / operations, (double)back_ns / operations,
           (unsigned long long)checksum);
    return 0;
}
