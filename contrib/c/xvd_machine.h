/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a driver in C joins the emulated machine of `xvd host DIR`: its side of the socket
 * DIR/machine, and of the memory that the machine shares. One file, which needs a C11 compiler
 * with GCC's atomics and Linux; copy it where you want it. docs/own-driver.md tells how it is
 * used, and examples/blkfront.c is a driver.
 *
 * THE SOCKET is of type SOCK_SEQPACKET. A request is one packet of JSON, ["CALL", [NUMBER, ...]],
 * and so is its answer, [RESULT, "ERROR", "TEXT", NUMBER], beside which descriptors may travel
 * (SCM_RIGHTS). One call at a time. ERROR is empty if the call succeeded; otherwise it is "grant"
 * (NUMBER is Xen's GNTST status), "evtchn" (NUMBER is an errno), "busy" or "config", and TEXT is
 * for people. A connection is a session of one domain: what is taken by it is given back when the
 * socket closes, however its process has ended. The first call is "open".
 *
 * A DOMAIN is two memfds, which "state" gives. The memory is `pages` pages of 4096 bytes and
 * begins with the grant table, `grefs` entries of version 1 as in Xen's grant_table.h. The heap
 * holds what the hypervisor keeps for itself: a header of 64 bytes, then a word of 8 bytes for
 * each reference (how often it is mapped), then `tracks` entries of 16 bytes (what is mapped of
 * others), then `ports` slots, struct xvd_port_slot. Granting a page is writing an entry of the
 * grant table. Only the host writes a slot, but for its `pending`.
 *
 * Mapping another domain's grants, which a backend does, is not here: the host must be able to
 * tell what a process held that was killed in the middle of it
 * (src/xvd/machine/emulated/shared.pyx).
 */
#ifndef XVD_MACHINE_H
#define XVD_MACHINE_H

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define XVD_LINK_PROTOCOL 1
#define XVD_LINK_PACKET_MAX (256 * 1024)
#define XVD_LINK_FDS_MAX 4

/*
 * Every call: X(NAME, ARGUMENTS, RESULT, DESCRIPTORS, WHAT IT DOES). The last three are domain 0's
 * alone.
 */
#define XVD_LINK_CALLS(X)                                                                         \
    X(open, "protocol, domid", "session", "", "become a session of a domain; the first call")     \
    X(state, "domid", "[pages, grefs, tracks, ports]", "memory, heap", "a domain's shared state") \
    X(share, "peer, count", "[frame, [gref, ...]]", "",                                           \
      "take contiguous zeroed pages, and a reference for each; granted to nobody yet")            \
    X(unshare, "frame", "null", "", "give them back; deferred while the peer maps one")           \
    X(alloc_unbound, "peer", "port", "ours, peer's", "a port that the peer may bind")             \
    X(bind_interdomain, "peer, remote", "port", "ours, peer's", "bind to a port of the peer's")   \
    X(unbind, "port", "null", "", "close a port")                                                 \
    X(claim, "vdev", "null", "", "be the one frontend of a disk of this domain")                  \
    X(disclaim, "vdev", "null", "", "leave it to another")                                        \
    X(xenstore, "", "null", "socket", "a connection to the store under this domain's identity")   \
    X(restrict, "domids", "null", "", "have to do with these domains only, from now on")           \
    X(create_domain, "domid", "null", "", "make a domain; nothing happens if it exists")          \
    X(destroy_domain, "domid", "null", "", "end its sessions and forget it")                      \
    X(accounting, "", "{name: count}", "", "how much is taken, over all domains")

#define XVD_PAGE_SIZE 4096u

/* Status bits of a grant entry; the peer's mapping sets the last two. */
#define XVD_GTF_PERMIT_ACCESS 1u
#define XVD_GTF_READONLY 4u
#define XVD_GTF_READING 8u
#define XVD_GTF_WRITING 16u

struct xvd_grant_entry {
    uint16_t flags;
    uint16_t domid;
    uint32_t frame;
};

#define XVD_HEAP_HEADER 64u
#define XVD_HEAP_ACTIVE 8u
#define XVD_HEAP_TRACK 16u

/* State of a port: 0 free, 1 unbound, 2 bound between two domains. */
#define XVD_PORT_INTERDOMAIN 2u

struct xvd_port_slot {
    uint32_t state;
    uint32_t remote_domid;
    uint32_t remote_port;
    uint32_t pending;   /* an event waits: set by the sender, cleared by the receiver */
    uint32_t session;
    uint32_t sent;      /* events that this end has sent */
    uint32_t pad[2];
};

/* A domain's shared state, mapped by xvd_domain_open. */
struct xvd_domain {
    uint32_t domid;
    uint32_t pages, grefs, tracks, ports;
    uint8_t *memory, *heap;
    size_t heap_size;
    struct xvd_grant_entry *grants;
    struct xvd_port_slot *slots;
};

/* A session. `error` says what went wrong with the last call that failed, for people. */
struct xvd_machine {
    int fd;
    struct xvd_domain own;
    char error[256];
};

/* An end of an event channel; `fd` is readable while an event waits. */
struct xvd_channel {
    uint32_t port;
    int fd, peer_fd;
    struct xvd_port_slot *slot;
    struct xvd_domain *peer;
};

/* ---- Calls ---- */

static inline int xvd_fail(struct xvd_machine *m, const char *what)
{
    snprintf(m->error, sizeof m->error, "%s: %s", what, strerror(errno));
    return -1;
}

/* Take an answer apart: the result's numbers in their order. How many, or -1 with m->error. */
static inline int xvd_parse_answer(struct xvd_machine *m, const char *text, uint32_t *numbers,
                                   int room)
{
    int count = 0, depth = 0;
    size_t length;
    const char *at = text;
    for (; *at && !(*at == ',' && depth == 1); at++) {
        if (*at == '[' || *at == '{')
            depth++;
        else if (*at == ']' || *at == '}')
            depth--;
        else if (*at >= '0' && *at <= '9') {
            char *end;
            unsigned long number = strtoul(at, &end, 10);
            if (count < room)
                numbers[count] = (uint32_t)number;
            count++;
            at = end - 1;
        }
    }
    if (strncmp(at, ",\"\",", 4) == 0)
        return count;
    at = *at ? strstr(at, "\",\"") : NULL;      /* ,"ERROR","TEXT",NUMBER] */
    at = at ? at + 3 : "an answer that makes no sense";
    length = strcspn(at, "\"");
    snprintf(m->error, sizeof m->error, "%.*s", (int)length, at);
    return -1;
}

/*
 * Do a call: `format` and what follows are its arguments, as "%u,%u". How many numbers the
 * answer's result has, of which the first `room` are in `numbers`, and its descriptors, exactly
 * `nr_fds`; or -1 with m->error.
 */
static inline int xvd_call(struct xvd_machine *m, uint32_t *numbers, int room, int *fds, int nr_fds,
                           const char *call, const char *format, ...)
{
    union {
        char bytes[CMSG_SPACE(XVD_LINK_FDS_MAX * sizeof(int))];
        struct cmsghdr align;
    } control;
    char request[256], arguments[128], *answer = malloc(XVD_LINK_PACKET_MAX + 1);
    struct iovec part = {answer, XVD_LINK_PACKET_MAX};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes,
                             .msg_controllen = sizeof control.bytes};
    struct cmsghdr *rights;
    int received[XVD_LINK_FDS_MAX], nr_received = 0, count, i;
    ssize_t length;
    va_list list;

    va_start(list, format);
    vsnprintf(arguments, sizeof arguments, format, list);
    va_end(list);
    snprintf(request, sizeof request, "[\"%s\",[%s]]", call, arguments);
    if (answer == NULL)
        return xvd_fail(m, call);
    if (send(m->fd, request, strlen(request), MSG_NOSIGNAL) < 0
            || (length = recvmsg(m->fd, &message, MSG_CMSG_CLOEXEC)) <= 0) {
        free(answer);
        return xvd_fail(m, "the host is gone");
    }
    answer[length] = 0;
    rights = CMSG_FIRSTHDR(&message);
    if (rights != NULL && rights->cmsg_type == SCM_RIGHTS) {
        nr_received = (int)((rights->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(received, CMSG_DATA(rights), (size_t)nr_received * sizeof(int));
    }
    count = xvd_parse_answer(m, answer, numbers, room);
    free(answer);
    if (count >= 0 && nr_received == nr_fds) {
        for (i = 0; i < nr_fds; i++)
            fds[i] = received[i];
        return count;
    }
    for (i = 0; i < nr_received; i++)
        close(received[i]);
    if (count >= 0)
        snprintf(m->error, sizeof m->error, "%s: %d descriptors came", call, nr_received);
    return -1;
}

/* ---- Domains ---- */

static inline void xvd_domain_close(struct xvd_domain *d)
{
    if (d->memory != NULL)
        munmap(d->memory, (size_t)d->pages * XVD_PAGE_SIZE);
    if (d->heap != NULL)
        munmap(d->heap, d->heap_size);
    d->memory = d->heap = NULL;
}

static inline void *xvd_map_whole(int fd, size_t size)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return at == MAP_FAILED ? NULL : at;
}

/* Map a domain's shared state: 0, or -1 with m->error. */
static inline int xvd_domain_open(struct xvd_machine *m, uint32_t domid, struct xvd_domain *d)
{
    uint32_t limits[4];
    size_t slots;
    int fds[2];
    memset(d, 0, sizeof *d);
    if (xvd_call(m, limits, 4, fds, 2, "state", "%u", domid) < 0)
        return -1;
    d->domid = domid;
    d->pages = limits[0];
    d->grefs = limits[1];
    d->tracks = limits[2];
    d->ports = limits[3];
    slots = XVD_HEAP_HEADER + (size_t)d->grefs * XVD_HEAP_ACTIVE
            + (size_t)d->tracks * XVD_HEAP_TRACK;
    d->heap_size = slots + (size_t)d->ports * sizeof(struct xvd_port_slot);
    d->memory = xvd_map_whole(fds[0], (size_t)d->pages * XVD_PAGE_SIZE);
    d->heap = xvd_map_whole(fds[1], d->heap_size);
    if (d->memory == NULL || d->heap == NULL) {
        xvd_fail(m, "a domain's memory");
        xvd_domain_close(d);
        return -1;
    }
    d->grants = (struct xvd_grant_entry *)d->memory;
    d->slots = (struct xvd_port_slot *)(d->heap + slots);
    return 0;
}

/* Join the host in a directory, as a process of one of its domains: 0, or -1 with m->error. */
static inline int xvd_join(struct xvd_machine *m, const char *directory, uint32_t domid)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    uint32_t session;
    memset(m, 0, sizeof *m);
    m->fd = -1;
    if ((size_t)snprintf(address.sun_path, sizeof address.sun_path, "%s/machine", directory)
            >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        return xvd_fail(m, directory);
    }
    m->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (m->fd < 0 || connect(m->fd, (struct sockaddr *)&address, sizeof address) != 0)
        xvd_fail(m, address.sun_path);
    else if (xvd_call(m, &session, 1, NULL, 0, "open", "%d,%u", XVD_LINK_PROTOCOL, domid) == 1
            && xvd_domain_open(m, domid, &m->own) == 0)
        return 0;
    if (m->fd >= 0)
        close(m->fd);
    m->fd = -1;
    return -1;
}

/* End the session: the host takes back whatever is left. */
static inline void xvd_leave(struct xvd_machine *m)
{
    xvd_domain_close(&m->own);
    if (m->fd >= 0)
        close(m->fd);
    m->fd = -1;
}

/*
 * A connection to xenstore under this domain's identity, for its wire protocol: a descriptor, or
 * -1.
 */
static inline int xvd_xenstore(struct xvd_machine *m)
{
    int fd;
    return xvd_call(m, NULL, 0, &fd, 1, "xenstore", "%s", "") < 0 ? -1 : fd;
}

/*
 * Become the one frontend of a disk of this domain, and leave it to another: 0, or -1 with
 * m->error.
 */
static inline int xvd_claim(struct xvd_machine *m, uint32_t vdev)
{
    return xvd_call(m, NULL, 0, NULL, 0, "claim", "%u", vdev) < 0 ? -1 : 0;
}

static inline int xvd_disclaim(struct xvd_machine *m, uint32_t vdev)
{
    return xvd_call(m, NULL, 0, NULL, 0, "disclaim", "%u", vdev) < 0 ? -1 : 0;
}

/* ---- Grants ---- */

/*
 * Take `count` contiguous zeroed pages for one peer, with a reference for each; `grefs` has room
 * for them. 0, or -1 with m->error. Nobody may map one before xvd_grant.
 */
static inline int xvd_share(struct xvd_machine *m, uint32_t peer, uint32_t count, uint32_t *frame,
                            uint32_t *grefs)
{
    uint32_t *numbers = malloc(((size_t)count + 1) * sizeof *numbers);
    int found;
    if (numbers == NULL)
        return xvd_fail(m, "share");
    found = xvd_call(m, numbers, (int)count + 1, NULL, 0, "share", "%u,%u", peer, count);
    if (found == (int)count + 1) {
        *frame = numbers[0];
        memcpy(grefs, numbers + 1, count * sizeof *grefs);
    } else if (found >= 0)
        snprintf(m->error, sizeof m->error, "share: %d numbers in the answer", found);
    free(numbers);
    return found == (int)count + 1 ? 0 : -1;
}

/* Give them back. A page that the peer still maps is freed when it does not any more. */
static inline int xvd_unshare(struct xvd_machine *m, uint32_t frame)
{
    return xvd_call(m, NULL, 0, NULL, 0, "unshare", "%u", frame) < 0 ? -1 : 0;
}

static inline void *xvd_page(struct xvd_domain *own, uint32_t frame)
{
    return own->memory + (size_t)frame * XVD_PAGE_SIZE;
}

/*
 * Let `peer` map a page. An entry's flags are written last: it is never valid while it is half
 * written.
 */
static inline void xvd_grant(struct xvd_domain *own, uint32_t gref, uint32_t peer, uint32_t frame,
                             int readonly)
{
    struct xvd_grant_entry *entry = &own->grants[gref];
    uint16_t flags = (uint16_t)(XVD_GTF_PERMIT_ACCESS | (readonly ? XVD_GTF_READONLY : 0));
    __atomic_store_n(&entry->flags, 0, __ATOMIC_RELEASE);
    entry->frame = frame;
    entry->domid = (uint16_t)peer;
    __atomic_store_n(&entry->flags, flags, __ATOMIC_RELEASE);
}

/* Take it back: 0, or -1 while the peer has it mapped, and then nothing has changed. */
static inline int xvd_revoke(struct xvd_domain *own, uint32_t gref)
{
    uint16_t *flags = &own->grants[gref].flags;
    uint16_t now = __atomic_load_n(flags, __ATOMIC_ACQUIRE);
    do {
        if (now & (XVD_GTF_READING | XVD_GTF_WRITING))
            return -1;
    } while (!__atomic_compare_exchange_n(flags, &now, 0, 0, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE));
    return 0;
}

/* ---- Event channels ---- */

static inline int xvd_channel_open(struct xvd_machine *m, struct xvd_domain *peer,
                                   struct xvd_channel *c, const char *call, uint32_t remote)
{
    int fds[2];
    uint32_t port = 0;
    int bind = strcmp(call, "bind_interdomain") == 0;
    if (xvd_call(m, &port, 1, fds, 2, call, bind ? "%u,%u" : "%u", peer->domid, remote) < 0)
        return -1;
    if (port >= m->own.ports) {
        close(fds[0]);
        close(fds[1]);
        snprintf(m->error, sizeof m->error, "%s: there is no port %u", call, port);
        return -1;
    }
    *c = (struct xvd_channel){port, fds[0], fds[1], &m->own.slots[port], peer};
    return 0;
}

/* A port that `peer` may bind: 0, or -1 with m->error. `peer` stays open as long as the channel. */
static inline int xvd_alloc_unbound(struct xvd_machine *m, struct xvd_domain *peer,
                                    struct xvd_channel *c)
{
    return xvd_channel_open(m, peer, c, "alloc_unbound", 0);
}

/* The other end of a port that `peer` has left unbound for us; an event waits from the start. */
static inline int xvd_bind_interdomain(struct xvd_machine *m, struct xvd_domain *peer,
                                       uint32_t remote, struct xvd_channel *c)
{
    return xvd_channel_open(m, peer, c, "bind_interdomain", remote);
}

/* Send an event. What was written before is seen by whoever receives it. */
static inline void xvd_notify(struct xvd_channel *c)
{
    const uint64_t one = 1;
    uint32_t remote;
    if (__atomic_load_n(&c->slot->state, __ATOMIC_ACQUIRE) != XVD_PORT_INTERDOMAIN)
        return;
    remote = c->slot->remote_port;
    c->slot->sent++;
    if (remote < c->peer->ports
            && __atomic_exchange_n(&c->peer->slots[remote].pending, 1, __ATOMIC_SEQ_CST) == 0
            && write(c->peer_fd, &one, sizeof one) < 0)
        return;     /* as many events as fit wait there already */
}

/* Acknowledge: 1 if an event had come. Look at the ring afterwards, not before. */
static inline int xvd_consume(struct xvd_channel *c)
{
    uint64_t drained;
    if (read(c->fd, &drained, sizeof drained) < 0 && errno != EAGAIN)
        return 0;
    return (int)__atomic_exchange_n(&c->slot->pending, 0, __ATOMIC_SEQ_CST);
}

static inline void xvd_channel_close(struct xvd_machine *m, struct xvd_channel *c)
{
    xvd_call(m, NULL, 0, NULL, 0, "unbind", "%u", c->port);
    close(c->fd);
    close(c->peer_fd);
}

#endif
