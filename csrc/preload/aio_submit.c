/* SPDX-License-Identifier: Apache-2.0
 *
 * io_submit(): from a program's iocbs to requests of the disk.
 */
#undef _FORTIFY_SOURCE
#define _GNU_SOURCE
#include "preload/aio.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/clock.h"
#include "preload/disk.h"
#include "preload/lock.h"
#include "preload/real.h"
#include "preload/transfer.h"

#define MEMORY_ALIGNMENT_MASK 511u

static void flushed(struct vf_disk_io *io)
{
	struct vf_aio_request *request = (struct vf_aio_request *)io;

	request->aio->in_flight--;
	io->done = vf_aio_transferred;
	request->flush_after = false;
	vf_aio_finish(request, io->result < 0 ? io->result : request->written_bytes);
}

void vf_aio_transferred(struct vf_disk_io *io)
{
	struct vf_aio_request *request = (struct vf_aio_request *)io;

	if (vf_unlikely(request->flush_after && io->result >= 0)) {
		request->written_bytes = io->result;
		io->op = VF_DISK_FLUSH;
		io->iov = NULL;
		io->iov_count = 0;
		io->offset_bytes = io->length_bytes = 0;
		io->done = flushed;
		if (vf_disk_submit(request->aio->user, io) < 0) {
			io->result = -EIO;
			flushed(io);
		}
		return;
	}
	request->aio->in_flight--;
	request->flush_after = false;
	vf_aio_finish(request, io->result);
}

static int submit_io(struct vf_aio *aio, struct vf_aio_request *request)
{
	int result = vf_disk_submit(aio->user, &request->io);

	if (vf_likely(!result)) {
		aio->in_flight++;
		aio->must_publish = true;
	} else {
			request->flush_after = false;
		request->io.done = vf_aio_transferred;
		vf_aio_finish(request, result);
	}
	return 0;
}

/* Of a request that io_submit() itself has carried out. The eventfd may be any descriptor: written by a system call. */
static void finish_at_once(struct vf_aio_request *request, const struct iocb *iocb, int64_t result)
{
	uint64_t one = 1;

	if (!(iocb->aio_flags & IOCB_FLAG_RESFD)) {
		vf_aio_finish(request, result);
		return;
	}
	vf_aio_finish_in_ring(request, result);
	(void)!syscall(SYS_write, iocb->aio_resfd, &one, sizeof(one));
}

/* The uncommon requests: ends, parts of blocks, vectors, errors. The request is free to use; consumes it. */
static int submit_slow(struct vf_aio *aio, struct vf_aio_request *request, const struct iocb *iocb, struct vf_file *file,
		       const struct iovec *iov, int iov_count)
{
	bool write = iocb->aio_lio_opcode == IOCB_CMD_PWRITE || iocb->aio_lio_opcode == IOCB_CMD_PWRITEV;
	uint32_t block_mask = vf_disk_attach()->block_bytes - 1;
	uint64_t length_bytes = 0, capacity_bytes = vf_disk_capacity();
	uint32_t flags = vf_file_flags(file), bad = 0;
	ssize_t result;

	for (int i = 0; i < iov_count; i++) {
		length_bytes += iov[i].iov_len;
		bad |= ((uintptr_t)iov[i].iov_base & MEMORY_ALIGNMENT_MASK) | (iov[i].iov_len & block_mask);
		if (iov[i].iov_len > VF_TRANSFER_MAX_BYTES)
			length_bytes = UINT64_MAX / 2; /* vf_transfer() has the errors */
	}
	if (!(flags & O_DIRECT))
		bad = 0;
	if (bad || !length_bytes || length_bytes > VF_TRANSFER_MAX_BYTES || ((iocb->aio_offset | (int64_t)length_bytes) & block_mask) ||
	    iocb->aio_offset < 0 || (uint64_t)iocb->aio_offset + length_bytes > capacity_bytes ||
	    (write && (vf_disk_attach()->read_only || !(flags & O_DIRECT))) || (iocb->aio_flags & IOCB_FLAG_RESFD)) {
		/* Like Linux's buffered requests, these are done when io_submit() returns. vf_transfer() locks out those that
		 * write parts of the same blocks. */
		if (iocb->aio_offset < 0) {
			result = -1;
			errno = EINVAL;
		} else {
			result = vf_transfer(file, write, iov, iov_count, iocb->aio_offset, iocb->aio_rw_flags);
		}
		finish_at_once(request, iocb, result < 0 ? -errno : result);
		return 0;
	}
	if (iov_count > 1) {
		request->vector = malloc((size_t)iov_count * sizeof(*iov));
		if (!request->vector)
			return -ENOMEM;
		memcpy(request->vector, iov, (size_t)iov_count * sizeof(*iov));
		request->io.iov = request->vector;
	} else {
		request->iov = *iov;
		request->io.iov = &request->iov;
	}
	request->io.op = write ? VF_DISK_WRITE : VF_DISK_READ;
	request->io.iov_count = (uint32_t)iov_count;
	request->io.offset_bytes = (uint64_t)iocb->aio_offset;
	request->io.length_bytes = length_bytes;
	request->io.done = vf_aio_transferred;
	request->flush_after = write && ((flags & O_DSYNC) || (iocb->aio_rw_flags & (RWF_DSYNC | RWF_SYNC)));
	return submit_io(aio, request);
}

static int submit_flush(struct vf_aio *aio, struct vf_aio_request *request, const struct iocb *iocb)
{
	if (iocb->aio_flags & IOCB_FLAG_RESFD) {
		finish_at_once(request, iocb, vf_flush() < 0 ? -errno : 0);
		return 0;
	}
	request->io.op = VF_DISK_FLUSH;
	request->io.iov = NULL;
	request->io.iov_count = 0;
	request->io.offset_bytes = request->io.length_bytes = 0;
	request->written_bytes = 0;
	request->io.done = flushed;
	return submit_io(aio, request);
}

static bool may_transfer(const struct vf_file *file, uint32_t refused_mode)
{
	uint32_t mode = vf_file_flags(file) & O_ACCMODE;

	return mode != refused_mode && mode != O_ACCMODE;
}

/* Consumes the request unless it fails. */
static int submit_one(struct vf_aio *aio, struct vf_aio_request *request, const struct iocb *iocb, struct vf_file *file)
{
	struct iovec iov = { (void *)(uintptr_t)iocb->aio_buf, iocb->aio_nbytes };
	uint16_t command = iocb->aio_lio_opcode;

	request->data = iocb->aio_data;
	request->iocb = (uintptr_t)iocb;
	if ((iocb->aio_flags & IOCB_FLAG_RESFD) && vf_aio_ring_is_full(aio))
		return -EAGAIN;
	if (iocb->aio_rw_flags & ~(RWF_HIPRI | RWF_DSYNC | RWF_SYNC | RWF_NOWAIT | RWF_APPEND))
		return -EOPNOTSUPP;
	switch (command) {
	case IOCB_CMD_PREAD:
	case IOCB_CMD_PWRITE:
		if (!may_transfer(file, command == IOCB_CMD_PREAD ? O_WRONLY : O_RDONLY))
			return -EBADF;
		return submit_slow(aio, request, iocb, file, &iov, 1);
	case IOCB_CMD_PREADV:
	case IOCB_CMD_PWRITEV:
		if (!may_transfer(file, command == IOCB_CMD_PREADV ? O_WRONLY : O_RDONLY))
			return -EBADF;
		if (iocb->aio_nbytes > IOV_MAX)
			return -EINVAL;
		return submit_slow(aio, request, iocb, file, iov.iov_base, (int)iocb->aio_nbytes);
	case IOCB_CMD_FSYNC:
	case IOCB_CMD_FDSYNC:
		return submit_flush(aio, request, iocb);
	default:
		return -EINVAL;
	}
}

/* Returns how many of the first count were submitted, or a negative errno when the first of them failed. */
static long submit_to_kernel(struct vf_aio *aio, long count, struct iocb **iocbs)
{
	long result;

	if (!aio->kernel_context && syscall(SYS_io_setup, aio->request_count, &aio->kernel_context) < 0)
		return -errno;
	result = syscall(SYS_io_submit, aio->kernel_context, count, iocbs);
	if (result < 0)
		return -errno;
	aio->kernel_in_flight += (uint32_t)result;
	aio->is_odd = true;
	return result;
}

static int ready_user(struct vf_aio *aio)
{
	const struct vf_disk_info *info;

	if (vf_likely(aio->user != NULL))
		return 0;
	aio->user = vf_disk_user_new();
	if (!aio->user)
		return -errno;
	info = vf_disk_attach();
	aio->block_mask = info->block_bytes - 1;
	aio->capacity_at = info->read_only ? NULL : info->capacity_at;
	return 0;
}

/* The common requests: one range of whole blocks in aligned memory. Fills request->io for vf_disk_put(), or returns false. */
static inline bool is_common(struct vf_aio_request *request, const struct iocb *iocb, struct vf_file *file, uint32_t block_mask,
			     uint64_t capacity_bytes)
{
	uint64_t offset_bytes = (uint64_t)iocb->aio_offset, length_bytes = iocb->aio_nbytes, memory = iocb->aio_buf;
	uint32_t flags = vf_file_flags(file), command = iocb->aio_lio_opcode;

	_Static_assert(O_RDONLY == 0 && O_WRONLY == 1 && O_RDWR == 2, "bit 0: not for reading");
	if (vf_likely(command == IOCB_CMD_PREAD)) {
		if (vf_unlikely(flags & O_WRONLY))
			return false;
	} else if (vf_unlikely(command != IOCB_CMD_PWRITE || !(flags & O_DIRECT) || (flags & O_DSYNC) ||
			       ((flags & O_ACCMODE) != O_RDWR && (flags & O_ACCMODE) != O_WRONLY))) {
		return false;
	}
	/* One comparison of all that must be 0. */
	if (vf_unlikely(((offset_bytes | length_bytes) & block_mask) | (memory & MEMORY_ALIGNMENT_MASK) | iocb->aio_flags |
			(uint32_t)iocb->aio_rw_flags))
		return false;
	if (vf_unlikely(length_bytes - 1 >= VF_TRANSFER_MAX_BYTES || offset_bytes > capacity_bytes ||
			length_bytes > capacity_bytes - offset_bytes))
		return false;
	request->data = iocb->aio_data;
	request->iocb = (uintptr_t)iocb;
	request->io.op = command; /* VF_DISK_READ, VF_DISK_WRITE */
	request->io.memory = (void *)(uintptr_t)memory;
	request->io.offset_bytes = offset_bytes;
	request->io.length_bytes = length_bytes;
	request->io.result = (int64_t)length_bytes;
	return true;
}

/* Send requests that are linked by `next`, one after another where vf_disk_put() does not. */
__attribute__((noinline)) static void submit_chain(struct vf_aio *aio, struct vf_disk_io *io)
{
	while (io) {
		struct vf_aio_request *request = (struct vf_aio_request *)io;
		struct vf_disk_io *next = io->next;

		request->iov = (struct iovec){ io->memory, io->length_bytes };
		io->iov = &request->iov;
		io->iov_count = 1;
		aio->in_flight--;
		submit_io(aio, request);
		io = next;
	}
}

static int submit_to_disk(struct vf_aio *aio, const struct iocb *iocb, struct vf_file *file)
{
	struct vf_aio_request *request = aio->free;
	int result;

	if (vf_unlikely(!request))
		return -EAGAIN;
	aio->free = request->next;
	result = ready_user(aio);
	if (!result)
		result = submit_one(aio, request, iocb, file);
	if (result < 0) {
		request->next = aio->free;
		aio->free = request;
	}
	return result;
}

/* Uncommon ones, one after another. Returns how many, or a negative errno when the first of them failed. */
static long submit_uncommon(struct vf_aio *aio, long count, struct iocb **iocbs)
{
	struct vf_file *file = vf_file_of((int)iocbs[0]->aio_fildes);
	long foreign = 1;
	int result;

	if (file) {
		result = submit_to_disk(aio, iocbs[0], file);
		return result < 0 ? result : 1;
	}
	while (foreign < count && !vf_file_of((int)iocbs[foreign]->aio_fildes))
		foreign++;
	return submit_to_kernel(aio, foreign, iocbs);
}

/* The common requests at the begin of those are sent together. Returns how many. */
static inline long submit_common(struct vf_aio *aio, long count, struct iocb **iocbs)
{
	uint64_t capacity_bytes = vf_load_relaxed_u64(aio->capacity_at);
	struct vf_disk_io *first, **end = &first;
	uint32_t block_mask = aio->block_mask;
	long done = 0;

	do {
		const struct iocb *iocb = iocbs[done];
		struct vf_file *file = vf_file_of((int)iocb->aio_fildes);
		struct vf_aio_request *request = aio->free;

		if (vf_unlikely(!file || !request || !is_common(request, iocb, file, block_mask, capacity_bytes)))
			break;
		aio->free = request->next;
		*end = &request->io;
		end = &request->io.next;
		done++;
	} while (done < count);
	*end = NULL;
	if (vf_unlikely(!done))
		return 0;
	aio->in_flight += (uint32_t)done;
	first = vf_disk_put(aio->user, first);
	if (vf_unlikely(first != NULL))
		submit_chain(aio, first);
	return done;
}

__attribute__((noinline)) static long submit_any(struct vf_aio *aio, long count, struct iocb **iocbs, long done)
{
	long result = 0;

	while (done < count) {
		result = aio->capacity_at ? submit_common(aio, count - done, iocbs + done) : 0;
		if (!result)
			result = submit_uncommon(aio, count - done, iocbs + done);
		if (result <= 0)
			break;
		done += result;
	}
	if (aio->must_publish) {
		aio->must_publish = false;
		vf_disk_publish(aio->user);
	}
	return done ? done : result;
}

VF_EXPORT int io_submit(io_context_t context, long count, struct iocb **iocbs)
{
	struct vf_aio *aio;
	long result;

	if (vf_unlikely(!vf_peek_u32(&vf_wanted)))
		return VF_REAL(io_submit)(context, count, iocbs);
	aio = vf_aio_enter(context);
	if (vf_unlikely(!aio || count < 0)) {
		if (aio)
			vf_aio_leave(aio);
		return -EINVAL;
	}
	result = vf_likely(count && aio->capacity_at) ? submit_common(aio, count, iocbs) : 0;
	if (vf_unlikely(result != count || aio->must_publish))
		result = submit_any(aio, count, iocbs, result);
	if (vf_unlikely(aio->waits)) {
		aio->waits = false;
		vf_store_release_u32(&aio->submit_count, aio->submit_count + 1);
		syscall(SYS_futex, &aio->submit_count, FUTEX_WAKE_PRIVATE, INT_MAX);
	}
	vf_aio_leave(aio);
	return (int)result;
}
