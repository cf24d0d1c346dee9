/* SPDX-License-Identifier: Apache-2.0
 *
 * mmap() of the disk is refused. Memory that a program makes to share with its children becomes a memfd, which behaves
 * the same: the device can map that, and reads and writes it without a copy.
 */
#undef _FORTIFY_SOURCE
#define _GNU_SOURCE
#include "preload/memory.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload/disk.h"
#include "preload/files.h"
#include "preload/real.h"

#define FD_MIN 512L /* out of the way of a program that expects low numbers */

static uint32_t has_memory; /* vf_disk_memory_add() has been called */

/* The real calls are system calls: an allocator may map its first memory before dlsym() can be used. */
static void *map(void *address, size_t length_bytes, int protection, int flags, int fd, off_t offset)
{
	return (void *)syscall(SYS_mmap, address, length_bytes, protection, flags, fd, offset);
}

static void forget(void *address, size_t length_bytes)
{
	if (vf_unlikely(vf_peek_u32(&has_memory)))
		vf_disk_memory_remove(address, length_bytes);
}

int vf_memory_make(size_t length_bytes)
{
	int fd = (int)syscall(SYS_memfd_create, "vdusefast-memory", MFD_CLOEXEC), high_fd;

	if (fd < 0)
		return -1;
	high_fd = (int)syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, FD_MIN);
	if (high_fd >= 0) {
		syscall(SYS_close, fd);
		fd = high_fd;
	}
	if (syscall(SYS_ftruncate, fd, length_bytes) < 0) {
		int kept_errno = errno;

		syscall(SYS_close, fd);
		errno = kept_errno;
		return -1;
	}
	return fd;
}

void *vf_memory_map(void *address, size_t length_bytes, int protection, int flags, int fd)
{
	void *at = map(address, length_bytes, protection, flags, fd, 0);

	if (at == MAP_FAILED) {
		int kept_errno = errno;

		syscall(SYS_close, fd);
		errno = kept_errno;
		return at;
	}
	vf_disk_memory_add(at, length_bytes, fd, 0);
	vf_store_relaxed_u32(&has_memory, 1);
	return at;
}

/* As map() of shared anonymous memory. Falls back on it where a memfd cannot be had. */
static void *map_shared(void *address, size_t length_bytes, int protection, int flags)
{
	int fd = vf_memory_make(length_bytes);

	if (fd < 0)
		return map(address, length_bytes, protection, flags, -1, 0);
	return vf_memory_map(address, length_bytes, protection, flags & ~MAP_ANONYMOUS, fd);
}

VF_EXPORT void *mmap(void *address, size_t length_bytes, int protection, int flags, int fd, off_t offset)
{
	static uint32_t said;
	int type = flags & MAP_TYPE;

	if (vf_unlikely(!(flags & MAP_ANONYMOUS) && vf_file_of(fd))) {
		if (vf_exchange_if_u32(&said, 0, 1))
			vf_say("mmap() of %s is refused (ENODEV): this disk can be read and written, but not mapped",
			       vf_disk_attach()->path);
		errno = ENODEV;
		return MAP_FAILED;
	}
	if (vf_unlikely((flags & MAP_ANONYMOUS) && (type == MAP_SHARED || type == MAP_SHARED_VALIDATE) &&
			!(flags & (MAP_HUGETLB | MAP_FIXED)) && length_bytes && vf_peek_u32(&vf_wanted)))
		return map_shared(address, length_bytes, protection, flags);
	if (flags & MAP_FIXED)
		forget(address, length_bytes);
	return map(address, length_bytes, protection, flags, fd, offset);
}
VF_ALSO(mmap64, mmap);

VF_EXPORT int munmap(void *address, size_t length_bytes)
{
	forget(address, length_bytes);
	return (int)syscall(SYS_munmap, address, length_bytes);
}

/* From then on requests from this memory are copied. */
VF_EXPORT void *mremap(void *address, size_t old_bytes, size_t new_bytes, int flags, ...)
{
	void *to = NULL;
	va_list arguments;

	if (flags & MREMAP_FIXED) {
		va_start(arguments, flags);
		to = va_arg(arguments, void *);
		va_end(arguments);
		forget(to, new_bytes);
	}
	forget(address, old_bytes);
	return (void *)syscall(SYS_mremap, address, old_bytes, new_bytes, flags, to);
}
