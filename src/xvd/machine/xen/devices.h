/* SPDX-License-Identifier: Apache-2.0 */
/* Linux's doors to Xen for user space: ioctl numbers and argument layouts of /dev/xen/gntdev,
 * gntalloc and evtchn, in one place. They are the kernel's ABI (include/uapi/xen/), which a test
 * compares with this file; they stand here because not every system has those headers, and because
 * gntdev.h there leaves two types undefined. Numbers are _IOC(_IOC_NONE, letter, number, size),
 * where the size is that of the fixed part with room for one reference. */
#ifndef XVD_MACHINE_XEN_DEVICES_H
#define XVD_MACHINE_XEN_DEVICES_H

#include <stdint.h>
#include <sys/ioctl.h>

struct xvd_grant_ref { uint32_t domid, gref; };

struct xvd_map_grants {            /* the references follow */
    uint32_t count, pad;
    uint64_t index;                /* out: the offset to mmap */
    struct xvd_grant_ref refs[1];
};

struct xvd_unmap_grants {
    uint64_t index;
    uint32_t count, pad;
};

struct xvd_copy_foreign {
    uint32_t gref;
    uint16_t offset, domid;
};

union xvd_copy_side {
    void *local;
    struct xvd_copy_foreign foreign;
};

struct xvd_copy_segment {
    union xvd_copy_side source, dest;
    uint16_t size;
    uint16_t flags;                /* which side is a grant */
    int16_t status;                /* out: GNTST */
};

struct xvd_copy_grants {
    uint32_t count;
    struct xvd_copy_segment *segments;
};

struct xvd_alloc_grants {          /* gntalloc; more references follow */
    uint16_t domid;
    uint16_t flags;                /* 1: the peer may write */
    uint32_t count;
    uint64_t index;                /* out: the offset to mmap */
    uint32_t grefs[1];             /* out */
};

struct xvd_bind_interdomain { uint32_t remote_domain, remote_port; };

#define XVD_GNTDEV_MAP _IOC(_IOC_NONE, 'G', 0, sizeof(struct xvd_map_grants))
#define XVD_GNTDEV_UNMAP _IOC(_IOC_NONE, 'G', 1, sizeof(struct xvd_unmap_grants))
#define XVD_GNTDEV_COPY _IOC(_IOC_NONE, 'G', 8, sizeof(struct xvd_copy_grants))
#define XVD_GNTALLOC_ALLOC _IOC(_IOC_NONE, 'G', 5, sizeof(struct xvd_alloc_grants))
#define XVD_GNTALLOC_DEALLOC _IOC(_IOC_NONE, 'G', 6, sizeof(struct xvd_unmap_grants))
#define XVD_EVTCHN_BIND_INTERDOMAIN _IOC(_IOC_NONE, 'E', 1, sizeof(struct xvd_bind_interdomain))
#define XVD_EVTCHN_BIND_UNBOUND _IOC(_IOC_NONE, 'E', 2, sizeof(uint32_t))
#define XVD_EVTCHN_NOTIFY _IOC(_IOC_NONE, 'E', 4, sizeof(uint32_t))
#define XVD_EVTCHN_RESTRICT _IOC(_IOC_NONE, 'E', 6, sizeof(uint16_t))

#define XVD_COPY_SOURCE_GREF 1
#define XVD_COPY_DEST_GREF 2

_Static_assert(sizeof(struct xvd_map_grants) == 24, "gntdev map");
_Static_assert(sizeof(struct xvd_copy_segment) == 24, "gntdev copy");
_Static_assert(sizeof(struct xvd_alloc_grants) == 24, "gntalloc");

#endif
