/* SPDX-License-Identifier: Apache-2.0 */
#undef _FORTIFY_SOURCE
#define _GNU_SOURCE
#include "preload/transfer.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload/disk.h"
#include "preload/forked.h"
#include "preload/lock.h"
#include "preload/real.h"

#define MEMORY_ALIGNMENT 512u /* of O_DIRECT; that of most block devices in Linux */
#define BOUNCE_BYTES (256u << 10)
#define LOCK_BASE ((off_t)1 << 62) /* in the lock file: above all offsets that a program may lock */
#define RWF_KNOWN (RWF_HIPRI | RWF_DSYNC | RWF_SYNC | RWF_NOWAIT | RWF_APPEND)

/* What a thread needs for its calls. Not on the stack: a signal handler may leave a call by siglongjmp(). */
struct thread_user {
	struct vf_disk_user *user;
	uint32_t fork_count; /* of the process that made it */
	int lock_fd;
	bool exists;
	bool busy;
	uint8_t *bounce; /* of whole blocks */
	struct vf_disk_io io;
	bool done;
};

/* In static TLS: no access allocates memory. */
static __thread struct thread_user thread_user __attribute__((tls_model("initial-exec")));
static pthread_key_t at_thread_end;

static void free_thread_user(void *value)
{
	struct thread_user *me = value;

	if (me->exists && me->fork_count == vf_peek_u32(&vf_fork_count) && !me->busy)
		vf_disk_user_free(me->user);
	if (me->lock_fd >= 0)
		vf_fd_close_hidden(me->lock_fd);
	if (me->bounce)
		syscall(SYS_munmap, me->bounce, BOUNCE_BYTES);
	me->exists = false;
	me->bounce = NULL;
	me->lock_fd = -1;
}

__attribute__((constructor)) static void start(void)
{
	/* Without a key a thread's user lives until the process ends. */
	if (pthread_key_create(&at_thread_end, free_thread_user))
		at_thread_end = PTHREAD_KEYS_MAX;
}

/* The thread's user, marked busy. NULL with errno. */
static struct thread_user *enter(void)
{
	struct thread_user *me = &thread_user;

	vf_fork_check();
	uint32_t fork_count = vf_peek_u32(&vf_fork_count);
	if (me->exists && me->fork_count != fork_count) {
		/* Our parent's: its user and its lock stay with it. */
		if (me->lock_fd >= 0)
			vf_fd_close_hidden(me->lock_fd);
		me->exists = me->busy = false;
	}
	if (me->busy) {
		vf_say("a signal handler uses the disk while its thread waits for it: refused (EBUSY)");
		errno = EBUSY;
		return NULL;
	}
	if (!me->exists) {
		me->lock_fd = -1;
		me->busy = true; /* already: a handler that comes now must not wait for locks of this call */
		me->user = vf_disk_user_new();
		if (!me->user) {
			me->busy = false;
			return NULL;
		}
		me->fork_count = fork_count;
		me->exists = true;
		if (at_thread_end < PTHREAD_KEYS_MAX)
			pthread_setspecific(at_thread_end, me);
	}
	me->busy = true;
	return me;
}

static void leave(struct thread_user *me)
{
	me->busy = false;
}

static void note_done(struct vf_disk_io *io)
{
	struct thread_user *me = (void *)((uint8_t *)io - offsetof(struct thread_user, io));

	me->done = true;
}

/* Carry out one request and wait for it. Returns 0 or a negative errno. */
static int request(struct thread_user *me, enum vf_disk_op op, const struct iovec *iov, uint32_t iov_count,
		   uint64_t offset_bytes, uint64_t length_bytes)
{
	int result;

	me->io = (struct vf_disk_io){
		.op = op,
		.iov = iov,
		.iov_count = iov_count,
		.offset_bytes = offset_bytes,
		.length_bytes = length_bytes,
		.done = note_done,
	};
	me->done = false;
	result = vf_disk_submit(me->user, &me->io);
	if (result < 0)
		return result;
	vf_disk_publish(me->user);
	while (!me->done) {
		result = vf_disk_reap(me->user, 1, 1, -1);
		/* As of any disk, a request that is under way is not interrupted. */
		if (result < 0 && result != -EINTR && !me->done)
			return result;
	}
	return me->io.result < 0 ? (int)me->io.result : 0;
}

/* Lock or unlock blocks of the disk against processes and threads that write only a part of one of them. */
static int lock_blocks(struct thread_user *me, short type, uint64_t first, uint64_t count)
{
	struct flock range = {
		.l_type = type,
		.l_whence = SEEK_SET,
		.l_start = LOCK_BASE + (off_t)first,
		.l_len = (off_t)count,
	};

	if (me->lock_fd < 0) {
		me->lock_fd = vf_lock_file_open();
		if (me->lock_fd < 0)
			return -errno;
	}
	while (syscall(SYS_fcntl, me->lock_fd, F_OFD_SETLKW, &range) < 0)
		if (errno != EINTR)
			return -errno;
	return 0;
}

/* Copy between a buffer and the bytes of an iovec that begin skip_bytes into it. */
static void copy_iov(const struct iovec *iov, uint64_t skip_bytes, uint8_t *buffer, size_t length_bytes, bool to_iov)
{
	for (; length_bytes; iov++) {
		size_t part = iov->iov_len;

		if (skip_bytes >= part) {
			skip_bytes -= part;
			continue;
		}
		part -= skip_bytes;
		if (part > length_bytes)
			part = length_bytes;
		if (to_iov)
			memcpy((uint8_t *)iov->iov_base + skip_bytes, buffer, part);
		else
			memcpy(buffer, (const uint8_t *)iov->iov_base + skip_bytes, part);
		buffer += part;
		length_bytes -= part;
		skip_bytes = 0;
	}
}

static int make_bounce(struct thread_user *me)
{
	void *at;

	if (me->bounce)
		return 0;
	at = (void *)syscall(SYS_mmap, NULL, BOUNCE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		return -errno;
	me->bounce = at;
	return 0;
}

/* Whole blocks around [offset, offset + length), which fit the bounce buffer, are read; a write changes them. */
static int transfer_part(struct thread_user *me, bool write, const struct iovec *iov, uint64_t skip_bytes,
			 uint64_t offset_bytes, uint32_t length_bytes, uint32_t block_bytes)
{
	uint64_t start_bytes = offset_bytes & ~((uint64_t)block_bytes - 1);
	uint32_t head_bytes = (uint32_t)(offset_bytes - start_bytes);
	uint32_t whole_bytes = (head_bytes + length_bytes + block_bytes - 1) & ~(block_bytes - 1);
	uint32_t last = whole_bytes - block_bytes;
	bool tail = (head_bytes + length_bytes) & (block_bytes - 1);
	struct iovec bounce = { me->bounce, whole_bytes };
	int result = 0;

	if (!write) {
		result = request(me, VF_DISK_READ, &bounce, 1, start_bytes, whole_bytes);
		if (!result)
			copy_iov(iov, skip_bytes, me->bounce + head_bytes, length_bytes, true);
		return result;
	}
	if (head_bytes || (tail && !last)) {
		struct iovec block = { me->bounce, block_bytes };

		result = request(me, VF_DISK_READ, &block, 1, start_bytes, block_bytes);
	}
	if (!result && tail && last) {
		struct iovec block = { me->bounce + last, block_bytes };

		result = request(me, VF_DISK_READ, &block, 1, start_bytes + last, block_bytes);
	}
	if (result)
		return result;
	copy_iov(iov, skip_bytes, me->bounce + head_bytes, length_bytes, false);
	return request(me, VF_DISK_WRITE, &bounce, 1, start_bytes, whole_bytes);
}

/* Returns how many bytes were transferred, or a negative errno when none were. */
static int64_t transfer_parts(struct thread_user *me, bool write, const struct iovec *iov, uint64_t offset_bytes,
			      uint64_t length_bytes, uint32_t block_bytes)
{
	uint64_t done_bytes = 0;
	int result = make_bounce(me);

	while (!result && done_bytes < length_bytes) {
		uint64_t at = offset_bytes + done_bytes;
		uint64_t part = BOUNCE_BYTES - (at & (block_bytes - 1));
		uint64_t first = at / block_bytes, count;

		if (part > length_bytes - done_bytes)
			part = length_bytes - done_bytes;
		count = (at + part - 1) / block_bytes - first + 1;
		if (write)
			result = lock_blocks(me, F_WRLCK, first, count);
		if (result)
			break;
		result = transfer_part(me, write, iov, done_bytes, at, (uint32_t)part, block_bytes);
		if (write)
			lock_blocks(me, F_UNLCK, first, count);
		if (!result)
			done_bytes += part;
	}
	return done_bytes ? (int64_t)done_bytes : result;
}

static int64_t transfer_blocks(struct thread_user *me, bool write, const struct iovec *iov, uint32_t iov_count,
			       uint64_t offset_bytes, uint64_t length_bytes, uint32_t block_bytes, bool direct)
{
	uint64_t first = offset_bytes / block_bytes, count = length_bytes / block_bytes;
	int result = 0;

	if (write && !direct)
		result = lock_blocks(me, F_RDLCK, first, count);
	if (result)
		return result;
	result = request(me, write ? VF_DISK_WRITE : VF_DISK_READ, iov, iov_count, offset_bytes, length_bytes);
	if (write && !direct)
		lock_blocks(me, F_UNLCK, first, count);
	return result ? result : (int64_t)length_bytes;
}

/* Sum up the lengths; returns them, at most what one call carries, or a negative errno. */
static int64_t check_iov(const struct iovec *iov, int iov_count)
{
	uint64_t length_bytes = 0;

	if (iov_count < 0 || iov_count > IOV_MAX)
		return -EINVAL;
	for (int i = 0; i < iov_count; i++) {
		if ((ssize_t)iov[i].iov_len < 0)
			return -EINVAL;
		length_bytes += iov[i].iov_len;
		if (length_bytes > SSIZE_MAX)
			return -EINVAL;
	}
	return length_bytes > VF_TRANSFER_MAX_BYTES ? VF_TRANSFER_MAX_BYTES : (int64_t)length_bytes;
}

/* Whether each part may be transferred without a copy, as O_DIRECT demands. */
static bool is_aligned(const struct iovec *iov, int iov_count, uint32_t block_bytes)
{
	for (int i = 0; i < iov_count; i++)
		if ((uintptr_t)iov[i].iov_base % MEMORY_ALIGNMENT || iov[i].iov_len % block_bytes)
			return false;
	return true;
}

/* Copy the first length_bytes of an iovec, without empty entries. Returns how many entries those are. */
static uint32_t cut_iov(struct iovec *to, const struct iovec *iov, uint64_t length_bytes)
{
	uint32_t count = 0;

	for (; length_bytes; iov++) {
		if (!iov->iov_len)
			continue;
		to[count] = *iov;
		if (to[count].iov_len > length_bytes)
			to[count].iov_len = length_bytes;
		length_bytes -= to[count++].iov_len;
	}
	return count;
}

/* At an offset. length_bytes: at most what the iovec has, inside the capacity, and not 0. Returns bytes or a negative errno. */
static int64_t transfer_at(bool write, const struct iovec *iov, int iov_count, uint64_t offset_bytes,
			   uint64_t length_bytes, uint32_t flags)
{
	uint32_t block_bytes = vf_disk_attach()->block_bytes;
	bool whole = !((offset_bytes | length_bytes) & (block_bytes - 1));
	struct iovec cut[IOV_MAX];
	struct thread_user *me;
	int64_t result;

	if ((flags & O_DIRECT) && (!whole || !is_aligned(iov, iov_count, block_bytes)))
		return -EINVAL;
	me = enter();
	if (!me)
		return -errno;
	if (whole)
		result = transfer_blocks(me, write, cut, cut_iov(cut, iov, length_bytes), offset_bytes, length_bytes,
					 block_bytes, flags & O_DIRECT);
	else
		result = transfer_parts(me, write, iov, offset_bytes, length_bytes, block_bytes);
	if (write && result > 0 && (flags & O_DSYNC)) {
		int flushed = request(me, VF_DISK_FLUSH, NULL, 0, 0, 0);

		if (flushed < 0)
			result = flushed;
	}
	leave(me);
	return result;
}

/* Take length_bytes from the description's position on, before the end: returns how many these are, and where. */
static uint64_t take_position(struct vf_file *file, uint64_t length_bytes, uint64_t *offset_bytes)
{
	uint64_t capacity_bytes = vf_disk_capacity();
	uint64_t at, taken;

	do {
		at = vf_load_acquire_u64(&file->shared->position_bytes);
		taken = at >= capacity_bytes ? 0 : capacity_bytes - at;
		if (taken > length_bytes)
			taken = length_bytes;
	} while (!vf_exchange_if_u64(&file->shared->position_bytes, at, at + taken));
	*offset_bytes = at;
	return taken;
}

ssize_t vf_transfer(struct vf_file *file, bool write, const struct iovec *iov, int iov_count, int64_t offset,
		    uint32_t rwf_flags)
{
	const struct vf_disk_info *info = vf_disk_attach();
	uint32_t flags = vf_file_flags(file);
	int64_t length = check_iov(iov, iov_count), result;
	uint64_t offset_bytes = (uint64_t)offset, length_bytes, capacity_bytes;

	if ((flags & O_ACCMODE) == (write ? O_RDONLY : O_WRONLY) || (flags & O_ACCMODE) == O_ACCMODE)
		length = -EBADF;
	else if (rwf_flags & ~(uint32_t)RWF_KNOWN)
		length = -EOPNOTSUPP;
	else if (offset < VF_AT_POSITION)
		length = -EINVAL;
	else if (length > 0 && write && info->read_only)
		length = -EPERM;
	if (length <= 0) {
		if (length < 0)
			errno = (int)-length;
		return length < 0 ? -1 : 0;
	}
	if (rwf_flags & (RWF_DSYNC | RWF_SYNC))
		flags |= O_DSYNC;
	length_bytes = (uint64_t)length;
	if (offset == VF_AT_POSITION) {
		length_bytes = take_position(file, length_bytes, &offset_bytes);
	} else {
		capacity_bytes = vf_disk_capacity();
		if (offset_bytes >= capacity_bytes)
			length_bytes = 0;
		else if (length_bytes > capacity_bytes - offset_bytes)
			length_bytes = capacity_bytes - offset_bytes;
	}
	if (!length_bytes)
		result = write ? -ENOSPC : 0;
	else
		result = transfer_at(write, iov, iov_count, offset_bytes, length_bytes, flags);
	/* A position that another thread has moved since is left. */
	if (offset == VF_AT_POSITION && result < (int64_t)length_bytes)
		vf_exchange_if_u64(&file->shared->position_bytes, offset_bytes + length_bytes,
				   offset_bytes + (result > 0 ? (uint64_t)result : 0));
	if (result < 0) {
		errno = (int)-result;
		return -1;
	}
	return result;
}

static int simple(enum vf_disk_op op, uint64_t offset_bytes, uint64_t length_bytes)
{
	struct thread_user *me = enter();
	int result;

	if (!me)
		return -1;
	result = request(me, op, NULL, 0, offset_bytes, length_bytes);
	leave(me);
	if (result < 0) {
		errno = -result;
		return -1;
	}
	return 0;
}

int vf_flush(void)
{
	return simple(VF_DISK_FLUSH, 0, 0);
}

int vf_discard(uint64_t offset_bytes, uint64_t length_bytes)
{
	if (!vf_disk_attach()->discard_max_bytes) {
		errno = EOPNOTSUPP;
		return -1;
	}
	return simple(VF_DISK_DISCARD, offset_bytes, length_bytes);
}

/* Zeroes as data, for a device without the command. */
static int write_data_zeroes(uint64_t offset_bytes, uint64_t length_bytes)
{
	struct thread_user *me = enter();
	int result;

	if (!me)
		return -1;
	result = make_bounce(me);
	if (!result)
		memset(me->bounce, 0, BOUNCE_BYTES);
	while (!result && length_bytes) {
		struct iovec part = { me->bounce, length_bytes < BOUNCE_BYTES ? length_bytes : BOUNCE_BYTES };

		result = request(me, VF_DISK_WRITE, &part, 1, offset_bytes, part.iov_len);
		offset_bytes += part.iov_len;
		length_bytes -= part.iov_len;
	}
	leave(me);
	if (result < 0) {
		errno = -result;
		return -1;
	}
	return 0;
}

int vf_write_zeroes(uint64_t offset_bytes, uint64_t length_bytes, bool may_write_data)
{
	if (vf_disk_attach()->write_zeroes_max_bytes)
		return simple(VF_DISK_WRITE_ZEROES, offset_bytes, length_bytes);
	if (may_write_data)
		return write_data_zeroes(offset_bytes, length_bytes);
	errno = EOPNOTSUPP;
	return -1;
}
