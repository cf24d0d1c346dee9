/* SPDX-License-Identifier: Apache-2.0
 *
 * What a program asks and sets of a block device: stat(), lseek(), ioctl(), fallocate().
 */
#undef _FORTIFY_SOURCE
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "preload/disk.h"
#include "preload/names.h"
#include "preload/real.h"
#include "preload/transfer.h"

#define DISK_MAJOR 4095u /* Linux gives no block device a major above 511: nothing is found for it in /sys */

static int stat_found(int result, struct stat *st)
{
	if (vf_unlikely(!result && S_ISSOCK(st->st_mode)) && vf_is_stand_in(st)) {
		st->st_mode = S_IFBLK | (st->st_mode & 07777u);
		st->st_rdev = makedev(DISK_MAJOR, 0);
		st->st_size = st->st_blocks = 0;
		st->st_blksize = 4096;
	}
	return result;
}

VF_EXPORT int stat(const char *path, struct stat *st)
{
	return stat_found(VF_REAL(stat)(path, st), st);
}
VF_ALSO(stat64, stat);

VF_EXPORT int lstat(const char *path, struct stat *st)
{
	return stat_found(VF_REAL(lstat)(path, st), st);
}
VF_ALSO(lstat64, lstat);

/* Of a descriptor that is the disk: what the stand-in's path tells. */
static int stat_file(struct stat *st)
{
	return stat(vf_disk_attach()->path, st);
}

VF_EXPORT int fstat(int fd, struct stat *st)
{
	return vf_likely(!vf_file_of(fd)) ? stat_found(VF_REAL(fstat)(fd, st), st) : stat_file(st);
}
VF_ALSO(fstat64, fstat);

/* libc declares that no path is NULL, which Linux takes for an empty one: hide from the compiler where it comes from. */
static bool names_descriptor(const char *path, int flags)
{
	__asm__("" : "+r"(path));
	return (flags & AT_EMPTY_PATH) && !(path && *path);
}

VF_EXPORT int fstatat(int directory, const char *path, struct stat *st, int flags)
{
	if (vf_unlikely(vf_file_of(directory) != NULL) && names_descriptor(path, flags))
		return stat_file(st);
	return stat_found(VF_REAL(fstatat)(directory, path, st, flags), st);
}
VF_ALSO(fstatat64, fstatat);

VF_EXPORT int __xstat(int version, const char *path, struct stat *st)
{
	return stat_found(VF_REAL(__xstat)(version, path, st), st);
}
VF_ALSO(__xstat64, __xstat);

VF_EXPORT int __lxstat(int version, const char *path, struct stat *st)
{
	return stat_found(VF_REAL(__lxstat)(version, path, st), st);
}
VF_ALSO(__lxstat64, __lxstat);

VF_EXPORT int __fxstat(int version, int fd, struct stat *st)
{
	return vf_likely(!vf_file_of(fd)) ? stat_found(VF_REAL(__fxstat)(version, fd, st), st) : stat_file(st);
}
VF_ALSO(__fxstat64, __fxstat);

VF_EXPORT int __fxstatat(int version, int directory, const char *path, struct stat *st, int flags)
{
	if (vf_unlikely(vf_file_of(directory) != NULL) && names_descriptor(path, flags))
		return stat_file(st);
	return stat_found(VF_REAL(__fxstatat)(version, directory, path, st, flags), st);
}
VF_ALSO(__fxstatat64, __fxstatat);

VF_EXPORT int statx(int directory, const char *path, int flags, unsigned mask, struct statx *stx)
{
	struct stat st;
	int result;

	if (vf_unlikely(vf_file_of(directory) != NULL) && names_descriptor(path, flags)) {
		directory = AT_FDCWD;
		path = vf_disk_attach()->path;
	}
	/* The inode tells whether it is the stand-in. */
	result = VF_REAL(statx)(directory, path, flags, mask | STATX_TYPE | STATX_INO, stx);
	if (vf_likely(result || !S_ISSOCK(stx->stx_mode)))
		return result;
	st.st_mode = stx->stx_mode;
	st.st_ino = stx->stx_ino;
	st.st_dev = makedev(stx->stx_dev_major, stx->stx_dev_minor);
	if (!vf_is_stand_in(&st))
		return result;
	stx->stx_mode = (uint16_t)(S_IFBLK | (stx->stx_mode & 07777u));
	stx->stx_rdev_major = DISK_MAJOR;
	stx->stx_rdev_minor = 0;
	stx->stx_size = stx->stx_blocks = 0;
	stx->stx_blksize = 4096;
	return result;
}

VF_EXPORT off_t lseek(int fd, off_t offset, int whence)
{
	struct vf_file *file = vf_file_of(fd);
	int64_t capacity_bytes, at;

	if (vf_likely(!file))
		return VF_REAL(lseek)(fd, offset, whence);
	capacity_bytes = (int64_t)vf_disk_capacity();
	at = whence == SEEK_SET ? 0 :
	     whence == SEEK_CUR ? (int64_t)vf_load_acquire_u64(&file->shared->position_bytes) :
				  capacity_bytes;
	/* A block device has no SEEK_DATA and no SEEK_HOLE. */
	if (whence < SEEK_SET || whence > SEEK_END || __builtin_add_overflow(at, offset, &at) || at < 0 ||
	    at > capacity_bytes) {
		errno = EINVAL;
		return -1;
	}
	if (whence != SEEK_CUR || offset)
		vf_store_release_u64(&file->shared->position_bytes, (uint64_t)at);
	return at;
}
VF_ALSO(lseek64, lseek);

/* Whether a range is one of whole blocks inside the disk, which may be written. Else false with errno. */
static bool may_change(const struct vf_file *file, uint64_t offset_bytes, uint64_t length_bytes)
{
	const struct vf_disk_info *info = vf_disk_attach();
	uint64_t capacity_bytes = vf_disk_capacity();

	if ((vf_file_flags(file) & O_ACCMODE) == O_RDONLY)
		errno = EBADF;
	else if (info->read_only)
		errno = EPERM;
	else if (((offset_bytes | length_bytes) & (info->block_bytes - 1)) || !length_bytes ||
		 offset_bytes >= capacity_bytes || length_bytes > capacity_bytes - offset_bytes)
		errno = EINVAL;
	else
		return true;
	return false;
}

/* BLKDISCARD and its like: the argument is an offset and a length. */
static int change_range(const struct vf_file *file, unsigned long command, const uint64_t *range)
{
	if (!may_change(file, range[0], range[1]))
		return -1;
	if (command == BLKDISCARD)
		return vf_discard(range[0], range[1]);
	return vf_write_zeroes(range[0], range[1], true);
}

static int answer(const struct vf_file *file, unsigned long command, void *argument)
{
	const struct vf_disk_info *info = vf_disk_attach();

	switch (command) {
	case BLKGETSIZE64:
		*(uint64_t *)argument = vf_disk_capacity();
		return 0;
	case BLKGETSIZE:
		*(unsigned long *)argument = vf_disk_capacity() / 512u;
		return 0;
	case BLKSSZGET:
		*(int *)argument = (int)info->block_bytes;
		return 0;
	case BLKPBSZGET:
		*(unsigned *)argument = info->physical_block_bytes;
		return 0;
	case BLKBSZGET:
		*(int *)argument = 4096;
		return 0;
	case BLKIOMIN:
		*(unsigned *)argument = info->io_min_bytes;
		return 0;
	case BLKIOOPT:
		*(unsigned *)argument = info->io_opt_bytes;
		return 0;
	case BLKROGET:
		*(int *)argument = info->read_only;
		return 0;
	case BLKALIGNOFF:
		*(int *)argument = 0;
		return 0;
	case BLKDISCARDZEROES:
		*(unsigned *)argument = 0;
		return 0;
	case BLKROTATIONAL:
		*(unsigned short *)argument = 0;
		return 0;
	case BLKSECTGET:
		*(unsigned short *)argument = UINT16_MAX;
		return 0;
	case BLKRAGET:
	case BLKFRAGET:
		*(long *)argument = 0;
		return 0;
	case BLKRASET:
	case BLKFRASET:
	case BLKFLSBUF: /* nothing is cached here */
		return 0;
	case BLKBSZSET:
		if (*(int *)argument >= (int)info->block_bytes)
			return 0;
		errno = EINVAL;
		return -1;
	case BLKDISCARD:
	case BLKZEROOUT:
		return change_range(file, command, argument);
	case BLKSECDISCARD:
		errno = EOPNOTSUPP;
		return -1;
	case BLKRRPART: /* a disk without partitions */
		errno = EINVAL;
		return -1;
	default:
		errno = ENOTTY;
		return -1;
	}
}

VF_EXPORT int ioctl(int fd, unsigned long command, ...)
{
	struct vf_file *file = vf_file_of(fd);
	va_list arguments;
	void *argument;

	va_start(arguments, command);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	if (vf_likely(!file) || command == FIOCLEX || command == FIONCLEX)
		return VF_REAL(ioctl)(fd, command, argument);
	command = (uint32_t)command;
	if (!argument && command != BLKFLSBUF && command != BLKRRPART && command != BLKRASET && command != BLKFRASET) {
		errno = _IOC_TYPE(command) == 0x12 ? EFAULT : ENOTTY;
		return -1;
	}
	return answer(file, command, argument);
}

/* As of Linux's block devices: a range that is to keep the size ends where the disk ends. */
VF_EXPORT int fallocate(int fd, int mode, off_t offset, off_t length_bytes)
{
	struct vf_file *file = vf_file_of(fd);
	uint64_t capacity_bytes;

	if (vf_likely(!file))
		return VF_REAL(fallocate)(fd, mode, offset, length_bytes);
	if (mode != FALLOC_FL_ZERO_RANGE && mode != (FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE) &&
	    mode != (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)) {
		errno = EOPNOTSUPP;
		return -1;
	}
	if (offset < 0 || length_bytes <= 0) {
		errno = EINVAL;
		return -1;
	}
	capacity_bytes = vf_disk_capacity();
	if ((mode & FALLOC_FL_KEEP_SIZE) && (uint64_t)offset < capacity_bytes &&
	    (uint64_t)length_bytes > capacity_bytes - (uint64_t)offset)
		length_bytes = (off_t)(capacity_bytes - (uint64_t)offset);
	if (!may_change(file, (uint64_t)offset, (uint64_t)length_bytes))
		return -1;
	return vf_write_zeroes((uint64_t)offset, (uint64_t)length_bytes, !(mode & FALLOC_FL_PUNCH_HOLE));
}
VF_ALSO(fallocate64, fallocate);

/* An error number, and not errno. A block device has its blocks. */
VF_EXPORT int posix_fallocate(int fd, off_t offset, off_t length_bytes)
{
	if (vf_likely(!vf_file_of(fd)))
		return VF_REAL(posix_fallocate)(fd, offset, length_bytes);
	return ENODEV;
}
VF_ALSO(posix_fallocate64, posix_fallocate);

VF_EXPORT int ftruncate(int fd, off_t length_bytes)
{
	if (vf_likely(!vf_file_of(fd)))
		return VF_REAL(ftruncate)(fd, length_bytes);
	errno = EINVAL;
	return -1;
}
VF_ALSO(ftruncate64, ftruncate);

VF_EXPORT int posix_fadvise(int fd, off_t offset, off_t length_bytes, int advice)
{
	return vf_likely(!vf_file_of(fd)) ? VF_REAL(posix_fadvise)(fd, offset, length_bytes, advice) : 0;
}
VF_ALSO(posix_fadvise64, posix_fadvise);

VF_EXPORT ssize_t readahead(int fd, off_t offset, size_t length_bytes)
{
	return vf_likely(!vf_file_of(fd)) ? VF_REAL(readahead)(fd, offset, length_bytes) : 0;
}
