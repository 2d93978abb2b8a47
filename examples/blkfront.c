/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A minimal blkif frontend: it writes one page of a guest's disk, reads it back, compares, and
 * gives the disk back.
 *
 *     gcc -Wall -Icontrib/c -o blkfront examples/blkfront.c       # with Debian's libxen-dev
 *     ./blkfront DIR DOMID VDEV                                   # ./blkfront machine 1 xvda
 *
 * The machine is the emulated one of `xvd host DIR` (contrib/c/xvd_machine.h), the ring and its
 * messages are those of Xen's own headers, and the store is spoken to in its wire protocol. One
 * ring page, one request at a time, no features: what each step is for stands in
 * docs/own-driver.md. Nothing of the backend's is believed. Status 0: the page was the same; 1:
 * something went wrong, and stderr says what.
 */
#include <inttypes.h>
#include <stdbool.h>

#include "xvd_machine.h"

#define __XEN_INTERFACE_VERSION__ 0x00040500 /* since when the fences have these names */
#define xen_mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define xen_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)
#include <xen/xen.h>
#include <xen/io/blkif.h>
#include <xen/io/protocols.h>
#include <xen/io/xenbus.h>
#include <xen/io/xs_wire.h>

#define PATIENCE_MS 5000
#define OFFSET_SECTORS 64

static struct xvd_machine machine;
static int store = -1;

static void die(const char *what, const char *why)
{
    fprintf(stderr, "blkfront: %s: %s\n", what, why);
    exit(1); /* the host takes back what this process had */
}

/* ---- xenstore ---- */

static bool watch_fired;

static void store_read(void *data, size_t length)
{
    for (size_t got = 0; got < length;) {
        ssize_t n = read(store, (char *)data + got, length - got);
        if (n <= 0)
            die("xenstore", n ? strerror(errno) : "it has gone");
        got += (size_t)n;
    }
}

/* Take one message: its type. `payload` ends with a NUL of our own. */
static uint32_t store_message(char payload[XENSTORE_PAYLOAD_MAX + 1])
{
    struct xsd_sockmsg head;
    store_read(&head, sizeof head);
    if (head.len > XENSTORE_PAYLOAD_MAX)
        die("xenstore", "a message is too long");
    store_read(payload, head.len);
    payload[head.len] = 0;
    return head.type;
}

/*
 * Ask, and wait for the answer; a watch that fires meanwhile is noted. False if the store refuses.
 */
static bool store_ask(uint32_t type, const char *request, size_t length,
                      char answer[XENSTORE_PAYLOAD_MAX + 1])
{
    struct xsd_sockmsg head = {.type = type, .len = (uint32_t)length};
    char message[sizeof head + 1024];
    uint32_t found;
    if (length > sizeof message - sizeof head)
        die(request, "a request is too long");
    memcpy(message, &head, sizeof head);
    memcpy(message + sizeof head, request, length);
    if (write(store, message, sizeof head + length) != (ssize_t)(sizeof head + length))
        die("xenstore", strerror(errno));
    while ((found = store_message(answer)) == XS_WATCH_EVENT)
        watch_fired = true;
    return found == type;
}

static const char *store_get(const char *directory, const char *node)
{
    static char value[XENSTORE_PAYLOAD_MAX + 1];
    char path[512];
    size_t length = (size_t)snprintf(path, sizeof path, "%s/%s", directory, node) + 1;
    return store_ask(XS_READ, path, length, value) ? value : NULL;
}

/* A node that must hold a number, and nothing else. */
static uint64_t store_number(const char *directory, const char *node)
{
    const char *text = store_get(directory, node);
    char *end;
    uint64_t number;
    if (text == NULL)
        die(node, "the node is missing");
    errno = 0;
    number = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno)
        die(node, "the node holds no number");
    return number;
}

static void store_put(const char *directory, const char *node, const char *value)
{
    char request[768], answer[XENSTORE_PAYLOAD_MAX + 1];
    int path = snprintf(request, sizeof request, "%s/%s", directory, node) + 1;
    int length = path + snprintf(request + path, sizeof request - (size_t)path, "%s", value);
    if (!store_ask(XS_WRITE, request, (size_t)length, answer))
        die(node, answer);
}

static void store_put_number(const char *directory, const char *node, unsigned number)
{
    char text[16];
    snprintf(text, sizeof text, "%u", number);
    store_put(directory, node, text);
}

/* ---- The device ---- */

static char frontend[64], backend[256];

static unsigned backend_state(void)
{
    const char *text = store_get(backend, "state");
    return text ? (unsigned)strtoul(text, NULL, 10) : XenbusStateUnknown;
}

/* Wait until the backend is in one of two states; it may end before. */
static void wait_for_backend(unsigned wanted, unsigned or_else)
{
    struct pollfd event = {.fd = store, .events = POLLIN};
    char payload[XENSTORE_PAYLOAD_MAX + 1];
    unsigned state;
    while ((state = backend_state()) != wanted && state != or_else) {
        if (wanted == XenbusStateConnected
                && (state == XenbusStateClosing || state == XenbusStateClosed))
            die(backend, "the backend refuses the disk");
        if (!watch_fired && poll(&event, 1, PATIENCE_MS) <= 0)
            die(backend, "the backend does not answer");
        if (!watch_fired)
            store_message(payload);
        watch_fired = false;
    }
}

static void watch_backend(void)
{
    char request[300], answer[XENSTORE_PAYLOAD_MAX + 1];
    int length = snprintf(request, sizeof request, "%s/state", backend) + 1;
    length += snprintf(request + length, sizeof request - (size_t)length, "backend") + 1;
    if (!store_ask(XS_WATCH, request, (size_t)length, answer))
        die(request, answer);
}

/* The number of a disk: xvda to xvdp, or as it is. */
static uint32_t number_of(const char *vdev)
{
    char *end;
    if (strncmp(vdev, "xvd", 3) == 0 && vdev[3] >= 'a' && vdev[3] <= 'p' && vdev[4] == 0)
        return 202u << 8 | (uint32_t)(vdev[3] - 'a') << 4;
    uint32_t number = (uint32_t)strtoul(vdev, &end, 10);
    if (*vdev == 0 || *end)
        die(vdev, "write a disk as xvda or as 51712");
    return number;
}

/* ---- One request ---- */

struct queue {
    blkif_front_ring_t ring;
    struct xvd_channel channel;
    uint32_t vdev, data_gref;
};

/* Put a request for the whole data page on the ring, wait for its answer, and judge that. */
static void request(struct queue *q, uint8_t operation, uint64_t sector, uint64_t id)
{
    struct pollfd events[2] = {
        {.fd = q->channel.fd, .events = POLLIN}, {.fd = store, .events = POLLIN},
    };
    blkif_request_t *slot = RING_GET_REQUEST(&q->ring, q->ring.req_prod_pvt);
    blkif_response_t response;
    int notify, work;

    memset(slot, 0, sizeof *slot);
    slot->operation = operation;
    slot->nr_segments = 1;
    slot->handle = (blkif_vdev_t)q->vdev;
    slot->id = id;
    slot->sector_number = sector;
    slot->seg[0].gref = q->data_gref;
    slot->seg[0].last_sect = 7; /* first_sect is 0: eight sectors, both ends included */
    q->ring.req_prod_pvt++;
    RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&q->ring, notify);
    if (notify)
        xvd_notify(&q->channel);

    for (;;) {
        RING_FINAL_CHECK_FOR_RESPONSES(&q->ring, work);
        if (work)
            break;
        if (poll(events, 2, PATIENCE_MS) <= 0)
            die("request", "the backend does not answer");
        if (events[0].revents)
            xvd_consume(&q->channel);
        if (events[1].revents) {
            char payload[XENSTORE_PAYLOAD_MAX + 1];
            store_message(payload);
            if (backend_state() != XenbusStateConnected)
                die("request", "the backend has gone");
        }
    }
    if (q->ring.sring->rsp_prod - q->ring.rsp_cons > q->ring.req_prod_pvt - q->ring.rsp_cons)
        die("response", "there are more of them than requests");
    xen_rmb();
    /* Copied once, and judged by the copy: the backend may write to the page again. */
    response = *RING_GET_RESPONSE(&q->ring, q->ring.rsp_cons);
    q->ring.rsp_cons++;
    if (response.id != id || response.operation != operation)
        die("response", "it answers nothing that was asked");
    if (response.status != BLKIF_RSP_OKAY)
        die("response", "the request has failed");
}

/* ---- A whole life ---- */

int main(int argc, char **argv)
{
    struct queue q = {0};
    struct xvd_domain peer;
    uint32_t frame = 0, grefs[2] = {0}, back;
    uint64_t sectors;
    uint8_t *data, expected[XVD_PAGE_SIZE];
    blkif_sring_t *sring;
    const char *text;

    if (argc != 4) {
        fprintf(stderr, "usage: %s DIR DOMID VDEV\n", argv[0]);
        return 2;
    }
    q.vdev = number_of(argv[3]);
    if (xvd_join(&machine, argv[1], (uint32_t)strtoul(argv[2], NULL, 10)) != 0)
        die(argv[1], machine.error);
    if (xvd_claim(&machine, q.vdev) != 0 || (store = xvd_xenstore(&machine)) < 0)
        die(argv[3], machine.error);

    /* Who serves the disk? Relative paths are those of this domain. */
    snprintf(frontend, sizeof frontend, "device/vbd/%" PRIu32, q.vdev);
    if ((text = store_get(frontend, "backend")) == NULL || strlen(text) >= sizeof backend)
        die(frontend, "there is no such disk");
    strcpy(backend, text);
    back = (uint32_t)store_number(frontend, "backend-id");
    if (store_number(frontend, "state") != XenbusStateInitialising)
        store_put_number(frontend, "state", XenbusStateInitialising); /* another driver was here */
    watch_backend();
    wait_for_backend(XenbusStateInitWait, XenbusStateInitWait);

    /*
     * Two pages: the ring, which the backend may write to, and the data. And a port for it to bind.
     */
    if (xvd_domain_open(&machine, back, &peer) != 0
            || xvd_share(&machine, back, 2, &frame, grefs) != 0
            || xvd_alloc_unbound(&machine, &peer, &q.channel) != 0)
        die("the machine", machine.error);
    xvd_grant(&machine.own, grefs[0], back, frame, 0);
    xvd_grant(&machine.own, grefs[1], back, frame + 1, 0);
    q.data_gref = grefs[1];
    data = xvd_page(&machine.own, frame + 1);
    sring = xvd_page(&machine.own, frame);
    SHARED_RING_INIT(sring);
    FRONT_RING_INIT(&q.ring, sring, XVD_PAGE_SIZE);

    /* Publish them, and wait for the backend to say what the disk is. */
    store_put_number(frontend, "ring-ref", grefs[0]);
    store_put_number(frontend, "event-channel", q.channel.port);
    store_put(frontend, "protocol", XEN_IO_PROTO_ABI_NATIVE);
    store_put_number(frontend, "state", XenbusStateInitialised);
    wait_for_backend(XenbusStateConnected, XenbusStateConnected);
    sectors = store_number(backend, "sectors");
    store_put_number(frontend, "state", XenbusStateConnected);
    if (sectors < OFFSET_SECTORS + 8)
        die("sectors", "the disk is too small");

    /* Write, spoil the page, read, compare. */
    for (unsigned i = 0; i < sizeof expected; i++)
        expected[i] = (uint8_t)(i * 7 + i / 256);
    memcpy(data, expected, sizeof expected);
    request(&q, BLKIF_OP_WRITE, OFFSET_SECTORS, 1);
    memset(data, 0, sizeof expected);
    request(&q, BLKIF_OP_READ, OFFSET_SECTORS, 2);
    if (memcmp(data, expected, sizeof expected) != 0)
        die("the data", "it is not what was written");

    /*
     * Give the disk back: the backend unmaps the ring when this end is closed, and only then is it
     * taken away.
     */
    store_put_number(frontend, "state", XenbusStateClosing);
    wait_for_backend(XenbusStateClosing, XenbusStateClosed);
    store_put_number(frontend, "state", XenbusStateClosed);
    wait_for_backend(XenbusStateClosed, XenbusStateInitWait);
    for (int i = 0; i < 2; i++)
        if (xvd_revoke(&machine.own, grefs[i]) != 0)
            die("a grant", "the backend has it mapped still");
    xvd_channel_close(&machine, &q.channel);
    xvd_unshare(&machine, frame);
    xvd_disclaim(&machine, q.vdev);
    xvd_domain_close(&peer);
    close(store);
    xvd_leave(&machine);
    printf("%" PRIu64 " sectors; 8 of them written, read and compared\n", sectors);
    return 0;
}
