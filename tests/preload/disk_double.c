/* SPDX-License-Identifier: Apache-2.0
 *
 * The double of the ring side (csrc/preload/disk.h) for tests of the interception layer: a disk in a file. Requests are
 * carried out when the program waits for them, the last one first.
 *
 * VDUSEFAST_DOUBLE names the file; _BLOCK, _READ_ONLY and _PLAIN (neither discard nor write zeroes) set what it is.
 * _SIGNAL: a thread that gets a user gets SIGUSR1, too.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload/disk.h"
#include "preload/files.h"
#include "preload/forked.h"

struct vf_disk_user {
	struct vf_disk_io *last;
	uint32_t fork_count;
};

static struct vf_disk_info info;
static int store = -1;

static const struct vf_disk_info *attach_locked(void)
{
	const char *path = getenv("VDUSEFAST_ATTACH"), *file = getenv("VDUSEFAST_DOUBLE"), *block = getenv("VDUSEFAST_DOUBLE_BLOCK");
	struct stat st;

	if (store >= 0)
		return &info;
	if (!path) {
		errno = ENOENT;
		return NULL;
	}
	if (!file || syscall(SYS_newfstatat, AT_FDCWD, path, &st, 0) < 0) {
		errno = ENXIO;
		return NULL;
	}
	store = (int)syscall(SYS_openat, AT_FDCWD, file, O_RDWR | O_CLOEXEC, 0);
	if (store < 0)
		abort();
	store = vf_fd_hide(store);
	info.path = path;
	info.stand_in_dev = st.st_dev;
	info.stand_in_ino = st.st_ino;
	info.block_bytes = info.physical_block_bytes = block ? (uint32_t)atoi(block) : 512;
	info.queue_count = 1;
	info.read_only = getenv("VDUSEFAST_DOUBLE_READ_ONLY") != NULL;
	if (!getenv("VDUSEFAST_DOUBLE_PLAIN"))
		info.discard_max_bytes = info.write_zeroes_max_bytes = 1 << 20;
	if (syscall(SYS_fstat, store, &st) < 0)
		abort();
	info.capacity_bytes = (uint64_t)st.st_size;
	info.capacity_at = &info.capacity_bytes;
	return &info;
}

const struct vf_disk_info *vf_disk_attach(void)
{
	static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
	const struct vf_disk_info *found;

	pthread_mutex_lock(&mutex);
	found = attach_locked();
	pthread_mutex_unlock(&mutex);
	return found;
}

uint64_t vf_disk_capacity(void)
{
	struct stat st;

	vf_disk_attach();
	if (syscall(SYS_fstat, store, &st) < 0)
		abort();
	return (uint64_t)st.st_size;
}

bool vf_disk_owns_fd(int fd)
{
	(void)fd;
	return false; /* it is hidden */
}

struct vf_disk_user *vf_disk_user_new(void)
{
	struct vf_disk_user *user = calloc(1, sizeof(*user));

	if (getenv("VDUSEFAST_DOUBLE_SIGNAL"))
		raise(SIGUSR1); /* as if it came while the server is asked */
	if (user)
		user->fork_count = vf_fork_count;
	return user;
}

void vf_disk_user_free(struct vf_disk_user *user)
{
	if (user->fork_count == vf_fork_count && user->last)
		abort(); /* the interception layer waits for its requests */
	free(user);
}

int vf_disk_submit(struct vf_disk_user *user, struct vf_disk_io *io)
{
	uint64_t sum = 0;

	if (user->fork_count != vf_fork_count)
		return -ESHUTDOWN;
	for (uint32_t i = 0; i < io->iov_count; i++)
		sum += io->iov[i].iov_len;
	if (io->op <= VF_DISK_WRITE && (sum != io->length_bytes || !sum))
		abort();
	if ((io->offset_bytes | io->length_bytes) % info.block_bytes || io->offset_bytes + io->length_bytes > vf_disk_capacity())
		abort();
	io->next = user->last;
	user->last = io;
	return 0;
}

void vf_disk_publish(struct vf_disk_user *user)
{
	(void)user;
}

struct vf_disk_io *vf_disk_put(struct vf_disk_user *user, struct vf_disk_io *first)
{
	(void)user;
	return first;
}

struct vf_disk_io *vf_disk_take(struct vf_disk_user *user, uint32_t max)
{
	(void)user;
	(void)max;
	return NULL;
}

static int64_t carry_out(const struct vf_disk_io *io)
{
	long result = 0;

	switch (io->op) {
	case VF_DISK_READ:
		result = syscall(SYS_preadv, store, io->iov, (long)io->iov_count, io->offset_bytes, 0L);
		break;
	case VF_DISK_WRITE:
		result = syscall(SYS_pwritev, store, io->iov, (long)io->iov_count, io->offset_bytes, 0L);
		break;
	case VF_DISK_FLUSH:
		break;
	case VF_DISK_DISCARD:
	case VF_DISK_WRITE_ZEROES:
		result = syscall(SYS_fallocate, store, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, io->offset_bytes, io->length_bytes);
		return result < 0 ? -errno : (int64_t)io->length_bytes;
	}
	return result < 0 ? -errno : result;
}

int vf_disk_reap(struct vf_disk_user *user, uint32_t min, uint32_t max, int64_t timeout_ns)
{
	uint32_t count = 0;

	(void)min;
	(void)timeout_ns;
	if (user->fork_count != vf_fork_count)
		return -ESHUTDOWN;
	for (; user->last && count < max; count++) {
		struct vf_disk_io *io = user->last;

		user->last = io->next;
		io->result = carry_out(io);
		io->done(io);
	}
	return (int)count;
}

void vf_disk_memory_add(void *address, size_t length, int fd, off_t offset)
{
	(void)address;
	(void)length;
	(void)offset;
	syscall(SYS_close, fd);
}

void vf_disk_memory_remove(void *address, size_t length)
{
	(void)address;
	(void)length;
}
