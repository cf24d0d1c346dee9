/* SPDX-License-Identifier: Apache-2.0
 *
 * Calls that move data, or that wait until it is safe.
 */
#undef _FORTIFY_SOURCE
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <unistd.h>

#include "preload/names.h"
#include "preload/real.h"
#include "preload/transfer.h"

/* pread() and its like take no offset that means the position. */
static ssize_t transfer_from(struct vf_file *file, bool write, const struct iovec *iov, int iov_count, off_t offset)
{
	if (offset < 0) {
		errno = EINVAL;
		return -1;
	}
	return vf_transfer(file, write, iov, iov_count, offset, 0);
}

VF_EXPORT ssize_t read(int fd, void *buffer, size_t length_bytes)
{
	struct vf_file *file = vf_file_of(fd);

	if (vf_likely(!file))
		return VF_REAL(read)(fd, buffer, length_bytes);
	return vf_transfer(file, false, &(struct iovec){ buffer, length_bytes }, 1, VF_AT_POSITION, 0);
}

VF_EXPORT ssize_t __read_chk(int fd, void *buffer, size_t length_bytes, size_t buffer_bytes)
{
	struct vf_file *file = vf_file_of(fd);

	if (vf_likely(!file || length_bytes > buffer_bytes))
		return VF_REAL(__read_chk)(fd, buffer, length_bytes, buffer_bytes);
	return vf_transfer(file, false, &(struct iovec){ buffer, length_bytes }, 1, VF_AT_POSITION, 0);
}

VF_EXPORT ssize_t write(int fd, const void *buffer, size_t length_bytes)
{
	struct vf_file *file = vf_file_of(fd);

	if (vf_likely(!file))
		return VF_REAL(write)(fd, buffer, length_bytes);
	return vf_transfer(file, true, &(struct iovec){ (void *)(uintptr_t)buffer, length_bytes }, 1, VF_AT_POSITION, 0);
}

VF_EXPORT ssize_t pread(int fd, void *buffer, size_t length_bytes, off_t offset)
{
	struct vf_file *file = vf_file_of(fd);

	if (vf_likely(!file))
		return VF_REAL(pread)(fd, buffer, length_bytes, offset);
	return transfer_from(file, false, &(struct iovec){ buffer, length_bytes }, 1, offset);
}
VF_ALSO(pread64, pread);

VF_EXPORT ssize_t __pread_chk(int fd, void *buffer, size_t length_bytes, off_t offset, size_t buffer_bytes)
{
	struct vf_file *file = vf_file_of(fd);

	if (vf_likely(!file || length_bytes > buffer_bytes))
		return VF_REAL(__pread_chk)(fd, buffer, length_bytes, offset, buffer_bytes);
	return transfer_from(file, false, &(struct iovec){ buffer, length_bytes }, 1, offset);
}
VF_ALSO(__pread64_chk, __pread_chk);

VF_EXPORT ssize_t pwrite(int fd, const void *buffer, size_t length_bytes, off_t offset)
{
	struct vf_file *file = vf_file_of(fd);

	if (vf_likely(!file))
		return VF_REAL(pwrite)(fd, buffer, length_bytes, offset);
	return transfer_from(file, true, &(struct iovec){ (void *)(uintptr_t)buffer, length_bytes }, 1, offset);
}
VF_ALSO(pwrite64, pwrite);

VF_EXPORT ssize_t readv(int fd, const struct iovec *iov, int iov_count)
{
	struct vf_file *file = vf_file_of(fd);

	if (vf_likely(!file))
		return VF_REAL(readv)(fd, iov, iov_count);
	return vf_transfer(file, false, iov, iov_count, VF_AT_POSITION, 0);
}

VF_EXPORT ssize_t writev(int fd, const struct iovec *iov, int iov_count)
{
	struct vf_file *file = vf_file_of(fd);

	if (vf_likely(!file))
		return VF_REAL(writev)(fd, iov, iov_count);
	return vf_transfer(file, true, iov, iov_count, VF_AT_POSITION, 0);
}

VF_EXPORT ssize_t preadv(int fd, const struct iovec *iov, int iov_count, off_t offset)
{
	struct vf_file *file = vf_file_of(fd);

	if (vf_likely(!file))
		return VF_REAL(preadv)(fd, iov, iov_count, offset);
	return transfer_from(file, false, iov, iov_count, offset);
}
VF_ALSO(preadv64, preadv);

VF_EXPORT ssize_t pwritev(int fd, const struct iovec *iov, int iov_count, off_t offset)
{
	struct vf_file *file = vf_file_of(fd);

	if (vf_likely(!file))
		return VF_REAL(pwritev)(fd, iov, iov_count, offset);
	return transfer_from(file, true, iov, iov_count, offset);
}
VF_ALSO(pwritev64, pwritev);

VF_EXPORT ssize_t preadv2(int fd, const struct iovec *iov, int iov_count, off_t offset, int flags)
{
	struct vf_file *file = vf_file_of(fd);

	if (vf_likely(!file))
		return VF_REAL(preadv2)(fd, iov, iov_count, offset, flags);
	return vf_transfer(file, false, iov, iov_count, offset, (uint32_t)flags);
}
VF_ALSO(preadv64v2, preadv2);

VF_EXPORT ssize_t pwritev2(int fd, const struct iovec *iov, int iov_count, off_t offset, int flags)
{
	struct vf_file *file = vf_file_of(fd);

	if (vf_likely(!file))
		return VF_REAL(pwritev2)(fd, iov, iov_count, offset, flags);
	return vf_transfer(file, true, iov, iov_count, offset, (uint32_t)flags);
}
VF_ALSO(pwritev64v2, pwritev2);

VF_EXPORT int fsync(int fd)
{
	return vf_likely(!vf_file_of(fd)) ? VF_REAL(fsync)(fd) : vf_flush();
}

VF_EXPORT int fdatasync(int fd)
{
	return vf_likely(!vf_file_of(fd)) ? VF_REAL(fdatasync)(fd) : vf_flush();
}

VF_EXPORT int syncfs(int fd)
{
	return vf_likely(!vf_file_of(fd)) ? VF_REAL(syncfs)(fd) : vf_flush();
}

/* Has Linux write cached pages to the device, without a flush: here they have been written. */
VF_EXPORT int sync_file_range(int fd, off_t offset, off_t length_bytes, unsigned flags)
{
	return vf_likely(!vf_file_of(fd)) ? VF_REAL(sync_file_range)(fd, offset, length_bytes, flags) : 0;
}

/* Programs fall back on read() and write(). */
static ssize_t refuse(void)
{
	errno = EINVAL;
	return -1;
}

VF_EXPORT ssize_t sendfile(int to, int from, off_t *offset, size_t length_bytes)
{
	if (vf_likely(!vf_file_of(to) && !vf_file_of(from)))
		return VF_REAL(sendfile)(to, from, offset, length_bytes);
	return refuse();
}
VF_ALSO(sendfile64, sendfile);

VF_EXPORT ssize_t splice(int from, off_t *from_offset, int to, off_t *to_offset, size_t length_bytes, unsigned flags)
{
	if (vf_likely(!vf_file_of(to) && !vf_file_of(from)))
		return VF_REAL(splice)(from, from_offset, to, to_offset, length_bytes, flags);
	return refuse();
}

VF_EXPORT ssize_t copy_file_range(int from, off_t *from_offset, int to, off_t *to_offset, size_t length_bytes,
				  unsigned flags)
{
	if (vf_likely(!vf_file_of(to) && !vf_file_of(from)))
		return VF_REAL(copy_file_range)(from, from_offset, to, to_offset, length_bytes, flags);
	return refuse();
}
