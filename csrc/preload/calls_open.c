/* SPDX-License-Identifier: Apache-2.0
 *
 * open(), close() and what makes descriptors from others.
 */
#undef _FORTIFY_SOURCE
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <string.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload/disk.h"
#include "preload/files.h"
#include "preload/names.h"
#include "preload/real.h"

/* Whether the program does not know of a descriptor, and must not close it. */
static bool is_protected(int fd)
{
	return vf_fd_is_hidden(fd) || (vf_unlikely(vf_peek_u32(&vf_wanted)) && vf_disk_owns_fd(fd));
}

static bool may_name_a_descriptor(const char *path)
{
	return !strncmp(path, "/proc/", 6) || !strncmp(path, "/dev/fd/", 8) || !strncmp(path, "/dev/std", 8);
}

/* After the real open: an open of a socket fails with ENXIO, whatever the path that leads there. An open that succeeds
 * may have come upon the memory behind one of our descriptors. */
static int opened(int result, int directory, const char *path, int flags)
{
	struct stat st;

	if (vf_unlikely(result < 0)) {
		if (errno != ENXIO)
			return result;
		if (!VF_REAL(fstatat)(directory, path, &st, flags & O_NOFOLLOW ? AT_SYMLINK_NOFOLLOW : 0) &&
		    vf_is_stand_in(&st))
			return vf_file_open(flags);
		errno = ENXIO;
		return result;
	}
	if (vf_unlikely(vf_file_of(result) != NULL))
		vf_file_forget_range((uint32_t)result, (uint32_t)result); /* closed by a system call that we do not see */
	if (vf_unlikely(may_name_a_descriptor(path)) && vf_file_of_memfd(result)) {
		VF_REAL(close)(result);
		return vf_file_open(flags);
	}
	return result;
}

VF_EXPORT int open(const char *path, int flags, ...)
{
	va_list arguments;
	mode_t mode;

	va_start(arguments, flags);
	mode = va_arg(arguments, mode_t);
	va_end(arguments);
	return opened(VF_REAL(open)(path, flags, mode), AT_FDCWD, path, flags);
}
VF_ALSO(open64, open);

VF_EXPORT int openat(int directory, const char *path, int flags, ...)
{
	va_list arguments;
	mode_t mode;

	va_start(arguments, flags);
	mode = va_arg(arguments, mode_t);
	va_end(arguments);
	return opened(VF_REAL(openat)(directory, path, flags, mode), directory, path, flags);
}
VF_ALSO(openat64, openat);

VF_EXPORT int creat(const char *path, mode_t mode)
{
	return opened(VF_REAL(creat)(path, mode), AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC);
}
VF_ALSO(creat64, creat);

VF_EXPORT int __open_2(const char *path, int flags)
{
	return opened(VF_REAL(__open_2)(path, flags), AT_FDCWD, path, flags);
}
VF_ALSO(__open64_2, __open_2);

VF_EXPORT int __openat_2(int directory, const char *path, int flags)
{
	return opened(VF_REAL(__openat_2)(directory, path, flags), directory, path, flags);
}
VF_ALSO(__openat64_2, __openat_2);

VF_EXPORT int close(int fd)
{
	if (vf_unlikely(vf_file_of(fd) != NULL))
		return vf_file_close(fd);
	if (vf_unlikely(is_protected(fd))) {
		errno = EBADF;
		return -1;
	}
	return VF_REAL(close)(fd);
}

/* The ranges between the hidden descriptors. */
VF_EXPORT int close_range(unsigned first, unsigned last, int flags)
{
	int result = 0;

	if (first > last || flags & ~(int)(CLOSE_RANGE_UNSHARE | CLOSE_RANGE_CLOEXEC)) {
		errno = EINVAL;
		return -1;
	}
	if (!(flags & (int)CLOSE_RANGE_CLOEXEC))
		vf_file_forget_range(first, last);
	while (!result && first <= last) {
		unsigned hidden = first;

		while (hidden < VF_FD_COUNT && hidden <= last && !is_protected((int)hidden))
			hidden++;
		if (hidden >= VF_FD_COUNT || hidden > last)
			return (int)syscall(SYS_close_range, first, last, flags);
		if (hidden > first)
			result = (int)syscall(SYS_close_range, first, hidden - 1, flags);
		first = hidden + 1;
	}
	return result;
}

VF_EXPORT void closefrom(int first)
{
	close_range(first < 0 ? 0 : (unsigned)first, UINT_MAX, 0);
}

VF_EXPORT int dup(int fd)
{
	struct vf_file *file = vf_file_of(fd);
	int result = VF_REAL(dup)(fd);

	return vf_unlikely(file != NULL) && result >= 0 ? vf_file_add_fd(file, result) : result;
}

/* As dup2() may fail while another thread opens that descriptor. */
static int busy(void)
{
	errno = EBUSY;
	return -1;
}

VF_EXPORT int dup2(int from, int to)
{
	if (vf_likely(!vf_file_of(from) && !vf_file_of(to) && !is_protected(to)))
		return VF_REAL(dup2)(from, to);
	if (is_protected(to))
		return busy();
	if (from == to)
		return VF_REAL(fcntl)(from, F_GETFD) < 0 ? -1 : to;
	return vf_file_dup_over(from, to, 0);
}

VF_EXPORT int dup3(int from, int to, int flags)
{
	if (vf_likely(!vf_file_of(from) && !vf_file_of(to) && !is_protected(to)))
		return VF_REAL(dup3)(from, to, flags);
	if (is_protected(to))
		return busy();
	return vf_file_dup_over(from, to, flags);
}

/* A vfork()ed child would change our table of its parent's descriptors. */
VF_EXPORT pid_t vfork(void)
{
	return fork();
}

#define SETTABLE_FLAGS (O_APPEND | O_DIRECT | O_NONBLOCK | O_NOATIME | O_ASYNC)

static int set_flags(struct vf_file *file, int flags)
{
	uint32_t from, to;

	do {
		from = vf_load_acquire_u32(&file->shared->flags);
		to = (from & ~(uint32_t)SETTABLE_FLAGS) | ((uint32_t)flags & SETTABLE_FLAGS);
	} while (!vf_exchange_if_u32(&file->shared->flags, from, to));
	return 0;
}

/* The descriptor on which the locks of a file are held. -1 with errno. */
static int lock_fd_of(struct vf_file *file)
{
	int fd = vf_file_lock_fd(file);

	if (fd < 0)
		errno = ENOLCK;
	return fd;
}

VF_EXPORT int fcntl(int fd, int command, ...)
{
	struct vf_file *file = vf_file_of(fd);
	va_list arguments;
	void *argument;
	int result;

	va_start(arguments, command);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	if (vf_likely(!file))
		return VF_REAL(fcntl)(fd, command, argument);
	switch (command) {
	case F_DUPFD:
	case F_DUPFD_CLOEXEC:
		result = VF_REAL(fcntl)(fd, command, argument);
		return result < 0 ? result : vf_file_add_fd(file, result);
	case F_GETFL:
		return (int)vf_file_flags(file);
	case F_SETFL:
		return set_flags(file, (int)(intptr_t)argument);
	case F_GETLK:
	case F_SETLK:
	case F_SETLKW:
	case F_OFD_GETLK:
	case F_OFD_SETLK:
	case F_OFD_SETLKW:
		result = lock_fd_of(file);
		return result < 0 ? -1 : VF_REAL(fcntl)(result, command, argument);
	default:
		return VF_REAL(fcntl)(fd, command, argument); /* F_GETFD and F_SETFD; EBADF of all others */
	}
}
VF_ALSO(fcntl64, fcntl);

VF_EXPORT int flock(int fd, int operation)
{
	struct vf_file *file = vf_file_of(fd);

	if (vf_likely(!file))
		return VF_REAL(flock)(fd, operation);
	fd = lock_fd_of(file);
	return fd < 0 ? -1 : VF_REAL(flock)(fd, operation);
}

VF_EXPORT int lockf(int fd, int command, off_t length_bytes)
{
	struct vf_file *file = vf_file_of(fd);

	if (vf_likely(!file))
		return VF_REAL(lockf)(fd, command, length_bytes);
	fd = lock_fd_of(file);
	return fd < 0 ? -1 : VF_REAL(lockf)(fd, command, length_bytes);
}
VF_ALSO(lockf64, lockf);
