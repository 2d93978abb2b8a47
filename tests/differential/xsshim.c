/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Lets the real C xenstored run where there is no Xen, by LD_PRELOAD: the few calls that it makes
 * to the hypervisor are answered from a directory, $XSSHIM_DIR, that a test shares with it.
 *
 *   domain-<n>   exists as long as domain n does; its 4096 bytes are the domain's xenstore ring
 *   ports        a pipe of 32-bit ports that fired; VIRQ_PORT says "look which domains are left"
 *   notified     a pipe that gets a byte whenever xenstored notifies a domain
 *
 * The monotonic clock runs ahead by CLOCK_STEP_MS with each look at it, so that the write-rate
 * limit, which would only make a test slow, never holds a domain up.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <xenctrl.h>
#include <xenevtchn.h>
#include <xengnttab.h>

enum { VIRQ_PORT = 1, RING_SIZE = 4096, CLOCK_STEP_MS = 50 };

static int handle;              /* its address stands for every library's handle */
static int ports_fd = -1;
static int notified_fd = -1;

static const char *shared_path(char *buffer, size_t size, const char *name)
{
	const char *directory = getenv("XSSHIM_DIR");

	snprintf(buffer, size, "%s/%s", directory ? directory : ".", name);
	return buffer;
}

static const char *ring_path(char *buffer, size_t size, uint32_t domid)
{
	char name[32];

	snprintf(name, sizeof(name), "domain-%u", domid);
	return shared_path(buffer, size, name);
}

/* The hypervisor. */

xc_interface *xc_interface_open(xentoollog_logger *logger, xentoollog_logger *dombuild_logger,
				unsigned flags)
{
	(void)logger, (void)dombuild_logger, (void)flags;
	return (xc_interface *)&handle;
}

int xc_interface_close(xc_interface *xch)
{
	(void)xch;
	return 0;
}

int xc_domain_getinfo(xc_interface *xch, uint32_t first_domid, unsigned int max_doms,
		      xc_dominfo_t *info)
{
	char path[4096];

	(void)xch, (void)max_doms;
	if (first_domid && access(ring_path(path, sizeof(path), first_domid), F_OK) < 0)
		return 0;
	memset(info, 0, sizeof(*info));
	info->domid = first_domid;
	info->running = 1;
	return 1;
}

/* Grants: the only page ever mapped is a domain's ring. */

xengnttab_handle *xengnttab_open(xentoollog_logger *logger, unsigned open_flags)
{
	(void)logger, (void)open_flags;
	return (xengnttab_handle *)&handle;
}

int xengnttab_close(xengnttab_handle *xgt)
{
	(void)xgt;
	return 0;
}

int xengnttab_set_max_grants(xengnttab_handle *xgt, uint32_t nr_grants)
{
	(void)xgt, (void)nr_grants;
	return 0;
}

void *xengnttab_map_grant_ref(xengnttab_handle *xgt, uint32_t domid, uint32_t ref, int prot)
{
	char path[4096];
	void *page;
	int fd = open(ring_path(path, sizeof(path), domid), O_RDWR | O_CLOEXEC);

	(void)xgt, (void)ref;
	if (fd < 0) {
		errno = EINVAL;
		return NULL;
	}
	page = mmap(NULL, RING_SIZE, prot, MAP_SHARED, fd, 0);
	close(fd);
	return page == MAP_FAILED ? NULL : page;
}

int xengnttab_unmap(xengnttab_handle *xgt, void *start_address, uint32_t count)
{
	(void)xgt;
	return munmap(start_address, (size_t)count * RING_SIZE);
}

/* Event channels: one pipe of ports that fired; a bound port keeps the number it had over there. */

xenevtchn_handle *xenevtchn_open(xentoollog_logger *logger, unsigned open_flags)
{
	char path[4096];

	(void)logger, (void)open_flags;
	ports_fd = open(shared_path(path, sizeof(path), "ports"), O_RDWR | O_CLOEXEC);
	notified_fd = open(shared_path(path, sizeof(path), "notified"),
			   O_RDWR | O_NONBLOCK | O_CLOEXEC);
	return ports_fd < 0 || notified_fd < 0 ? NULL : (xenevtchn_handle *)&handle;
}

int xenevtchn_close(xenevtchn_handle *xce)
{
	(void)xce;
	return 0;
}

int xenevtchn_fd(xenevtchn_handle *xce)
{
	(void)xce;
	return ports_fd;
}

xenevtchn_port_or_error_t xenevtchn_bind_virq(xenevtchn_handle *xce, unsigned virq)
{
	(void)xce, (void)virq;
	return VIRQ_PORT;
}

xenevtchn_port_or_error_t xenevtchn_bind_interdomain(xenevtchn_handle *xce, uint32_t domid,
						     evtchn_port_t remote_port)
{
	(void)xce, (void)domid;
	return (xenevtchn_port_or_error_t)remote_port;
}

int xenevtchn_unbind(xenevtchn_handle *xce, evtchn_port_t port)
{
	(void)xce, (void)port;
	return 0;
}

int xenevtchn_unmask(xenevtchn_handle *xce, evtchn_port_t port)
{
	(void)xce, (void)port;
	return 0;
}

xenevtchn_port_or_error_t xenevtchn_pending(xenevtchn_handle *xce)
{
	uint32_t port;

	(void)xce;
	return read(ports_fd, &port, sizeof(port)) == sizeof(port) ? (int)port : -1;
}

int xenevtchn_notify(xenevtchn_handle *xce, evtchn_port_t port)
{
	(void)xce, (void)port;
	/* A full pipe wakes its reader as well as one more byte would. */
	return write(notified_fd, "", 1) == 1 || errno == EAGAIN ? 0 : -1;
}

/* libc: the two files of a Xen kernel that tell dom0's own ring, and time. */

static int open_xen_file(const char *path)
{
	int fd = -1;

	if (!strcmp(path, "/proc/xen/xsd_port")) {
		fd = memfd_create("xsd_port", MFD_CLOEXEC);
		if (fd >= 0 && (write(fd, "2", 1) != 1 || lseek(fd, 0, SEEK_SET) != 0))
			return -1;
	} else if (!strcmp(path, "/proc/xen/xsd_kva") || !strcmp(path, "/dev/xen/xsd_kva")) {
		fd = memfd_create("xsd_kva", MFD_CLOEXEC);
		if (fd >= 0 && ftruncate(fd, RING_SIZE) < 0)
			return -1;
	}
	return fd;
}

#define REPLACE_OPEN(name)							\
	int name(const char *path, int flags, ...)				\
	{									\
		static int (*real)(const char *, int, ...);			\
		int fd = open_xen_file(path);					\
		va_list more;							\
		mode_t mode;							\
										\
		if (fd >= 0)							\
			return fd;						\
		va_start(more, flags);						\
		mode = va_arg(more, mode_t);					\
		va_end(more);							\
		if (!real)							\
			real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name); \
		return real(path, flags, mode);					\
	}

REPLACE_OPEN(open)
REPLACE_OPEN(open64)

int clock_gettime(clockid_t clock, struct timespec *now)
{
	static int (*real)(clockid_t, struct timespec *);
	static long ahead_ms;
	long ms;
	int result;

	if (!real)
		real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
	result = real(clock, now);
	if (result == 0 && clock == CLOCK_MONOTONIC) {
		ahead_ms += CLOCK_STEP_MS;
		ms = now->tv_nsec / 1000000 + ahead_ms;
		now->tv_sec += ms / 1000;
		now->tv_nsec = ms % 1000 * 1000000 + now->tv_nsec % 1000000;
	}
	return result;
}
