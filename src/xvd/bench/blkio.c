/* SPDX-License-Identifier: Apache-2.0
 *
 * A load on a vhost-user-blk server by libblkio, as `xvd load` puts it on a blkif ring: so many
 * operations under way, each that ends starts the next. The buffers lie in memory that is shared
 * with the server, which puts the data there itself.
 *
 *     blkio SOCKET [-n operations] [-d depth] [-b bytes] [-w percent-written] [-s span-bytes]
 *           [-r seed]  [-q] (sequential)  [-p] (poll, never sleep)
 *
 * Prints one line of JSON. The checksum is of the first bytes of what was read, as `xvd load`'s.
 */
#include <blkio.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { DEPTH_MAX = 1024 };

static uint64_t operations = 1000000, span = 256 << 20, seed = 1, started, checksum;
static uint32_t depth = 32, size = 4096, write_percent;
static int sequential, polled;
static struct blkioq *queue;
static uint8_t *data;
static uint8_t reading[DEPTH_MAX];

static uint64_t now_ns(clockid_t clock)
{
    struct timespec ts;
    clock_gettime(clock, &ts);
    return ts.tv_sec * 1000000000ull + ts.tv_nsec;
}

static void check(int rc, const char *what)
{
    if (rc < 0) {
        fprintf(stderr, "blkio: %s: %s: %s\n", what, strerror(-rc), blkio_get_error_msg());
        exit(1);
    }
}

static uint64_t draw(void)
{
    seed ^= seed >> 12;
    seed ^= seed << 25;
    seed ^= seed >> 27;
    return seed * 0x2545F4914F6CDD1D;
}

static void start(uintptr_t number)
{
    uint8_t *buffer = data + number * size;
    reading[number] = (draw() >> 32) % 100 >= write_percent;
    uint64_t places = span / size;
    uint64_t at = (sequential ? started % places : (draw() >> 11) % places) * size;
    if (reading[number]) blkioq_read(queue, at, buffer, size, (void *)number, 0);
    else blkioq_write(queue, at, buffer, size, (void *)number, 0);
    started++;
}

static void run(void)
{
    static struct blkio_completion ended[DEPTH_MAX];
    for (uintptr_t number = 0; number < depth && started < operations; number++) start(number);
    for (uint64_t done = 0; done < operations;) {
        int n = blkioq_do_io(queue, ended, polled ? 0 : 1, depth, NULL);
        check(n, "waiting");
        for (int i = 0; i < n; i++, done++) {
            uintptr_t number = (uintptr_t)ended[i].user_data;
            check(ended[i].ret, "an operation");
            if (reading[number]) checksum += *(uint64_t *)(data + number * size);
            if (started < operations) start(number);
        }
    }
}

static struct blkio *connect_to(const char *path)
{
    struct blkio *disk;
    check(blkio_create("virtio-blk-vhost-user", &disk), "no such driver");
    check(blkio_set_str(disk, "path", path), path);
    check(blkio_connect(disk), path);
    check(blkio_set_int(disk, "num-queues", 1), "queues");
    check(blkio_start(disk), "starting");
    return disk;
}

static void parse(int argc, char **argv)
{
    int option;
    while ((option = getopt(argc, argv, "n:d:b:w:s:r:qp")) != -1)
        switch (option) {
        case 'n': operations = strtoull(optarg, NULL, 0); break;
        case 'd': depth = strtoul(optarg, NULL, 0); break;
        case 'b': size = strtoul(optarg, NULL, 0); break;
        case 'w': write_percent = strtoul(optarg, NULL, 0); break;
        case 's': span = strtoull(optarg, NULL, 0); break;
        case 'r': seed = strtoull(optarg, NULL, 0); break;
        case 'q': sequential = 1; break;
        case 'p': polled = 1; break;
        default: exit(2);
        }
    if (optind >= argc || !operations || !seed || !depth || depth > DEPTH_MAX || !size ||
        size % 512 || span < size) {
        fprintf(stderr, "blkio: a socket, depth 1 to 1024, bytes a multiple of 512\n");
        exit(2);
    }
}

int main(int argc, char **argv)
{
    struct blkio_mem_region region;
    uint64_t begun, cpu_ns, ns;
    parse(argc, argv);
    struct blkio *disk = connect_to(argv[optind]);
    check(blkio_alloc_mem_region(disk, &region, ((size_t)depth * size + 4095) & ~4095ull),
          "memory");
    check(blkio_map_mem_region(disk, &region), "memory");
    data = region.addr;
    memset(data, 0x5a, (size_t)depth * size);
    queue = blkio_get_queue(disk, 0);
    blkioq_set_completion_fd_enabled(queue, !polled);
    begun = now_ns(CLOCK_MONOTONIC);
    cpu_ns = now_ns(CLOCK_THREAD_CPUTIME_ID);
    run();
    ns = now_ns(CLOCK_MONOTONIC) - begun;
    cpu_ns = now_ns(CLOCK_THREAD_CPUTIME_ID) - cpu_ns;
    blkio_destroy(&disk);
    printf("{\"operations\": %llu, \"seconds\": %.6f, \"front_ns\": %.1f, "
           "\"checksum\": \"%016llx\"}\n",
           (unsigned long long)operations, ns / 1e9, (double)cpu_ns / operations,
           (unsigned long long)checksum);
    return 0;
}
