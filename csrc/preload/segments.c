/* SPDX-License-Identifier: Apache-2.0
 *
 * Shared memory of shmget(IPC_PRIVATE): a memfd for the processes that know the number, which are this one and those that
 * it forks. fio has its buffers there with mem=shm. Another process cannot attach: shmat() fails there with EINVAL.
 */
#undef _FORTIFY_SOURCE
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload/files.h"
#include "preload/forked.h"
#include "preload/memory.h"
#include "preload/real.h"

#define ID_BASE 0x7f000000 /* the kernel numbers its segments from 0, in steps of 32768 */
#define SEGMENT_COUNT 1024u
#define ATTACHMENT_COUNT 4096u

struct segment {
	size_t length_bytes; /* 0: free */
	int fd;
};

struct attachment {
	void *at; /* NULL: free */
	size_t length_bytes;
};

static struct segment segments[SEGMENT_COUNT];
static struct attachment attachments[ATTACHMENT_COUNT];
static pthread_mutex_t segments_lock = PTHREAD_MUTEX_INITIALIZER; /* these functions are not for signal handlers */

static void lock(void)
{
	pthread_mutex_lock(&segments_lock);
}

static void unlock(void)
{
	pthread_mutex_unlock(&segments_lock);
}

static void lock_again(void)
{
	segments_lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER; /* a thread that does not exist here may have it */
}

__attribute__((constructor)) static void start(void)
{
	pthread_atfork(lock, unlock, unlock);
	vf_fork_when_unprepared(lock_again);
}

static struct segment *segment_of(int id)
{
	uint32_t number = (uint32_t)id - ID_BASE;

	return number < SEGMENT_COUNT && segments[number].length_bytes ? &segments[number] : NULL;
}

/* Whether an id is one of ours, or was. */
static bool is_ours(int id)
{
	return (uint32_t)id - ID_BASE < SEGMENT_COUNT && vf_peek_u32(&vf_wanted);
}

static int make_segment(size_t length_bytes)
{
	for (uint32_t number = 0; number < SEGMENT_COUNT; number++) {
		struct segment *segment = &segments[number];

		if (segment->length_bytes)
			continue;
		segment->fd = vf_memory_make(length_bytes);
		if (segment->fd < 0)
			return -1;
		segment->fd = vf_fd_hide(segment->fd); /* from closefrom(3) and the like */
		segment->length_bytes = length_bytes;
		return (int)(ID_BASE + number);
	}
	errno = ENOSPC;
	return -1;
}

VF_EXPORT int shmget(key_t key, size_t length_bytes, int flags)
{
	int id;

	if (key != IPC_PRIVATE || !length_bytes || (flags & SHM_HUGETLB) || !vf_peek_u32(&vf_wanted))
		return VF_REAL(shmget)(key, length_bytes, flags);
	lock();
	id = make_segment(length_bytes);
	unlock();
	return id;
}

static void *attach(int id, const void *address, int flags)
{
	struct segment *segment = segment_of(id);
	struct attachment *attachment = attachments;
	int protection = flags & SHM_RDONLY ? PROT_READ : PROT_READ | PROT_WRITE;
	void *at;
	int fd;

	while (attachment < attachments + ATTACHMENT_COUNT && attachment->at)
		attachment++;
	if (!segment || address || attachment == attachments + ATTACHMENT_COUNT) {
		errno = EINVAL;
		return MAP_FAILED;
	}
	fd = (int)syscall(SYS_fcntl, segment->fd, F_DUPFD_CLOEXEC, (long)segment->fd);
	if (fd < 0)
		return MAP_FAILED;
	at = vf_memory_map(NULL, segment->length_bytes, protection, MAP_SHARED, fd);
	if (at != MAP_FAILED)
		*attachment = (struct attachment){ at, segment->length_bytes };
	return at;
}

VF_EXPORT void *shmat(int id, const void *address, int flags)
{
	void *at;

	if (!is_ours(id))
		return VF_REAL(shmat)(id, address, flags);
	lock();
	at = attach(id, address, flags);
	unlock();
	return at;
}

VF_EXPORT int shmdt(const void *address)
{
	struct attachment found = { 0 };

	lock();
	for (uint32_t i = 0; i < ATTACHMENT_COUNT && address && !found.at; i++)
		if (attachments[i].at == address) {
			found = attachments[i];
			attachments[i].at = NULL;
		}
	unlock();
	return found.at ? munmap(found.at, found.length_bytes) : VF_REAL(shmdt)(address);
}

/* Removed at once: those that are attached keep their mappings. */
static int control(int id, int command, struct shmid_ds *state)
{
	struct segment *segment = segment_of(id);

	if (!segment || (command != IPC_RMID && command != IPC_STAT)) {
		errno = EINVAL;
		return -1;
	}
	if (command == IPC_STAT) {
		memset(state, 0, sizeof(*state));
		state->shm_segsz = segment->length_bytes;
		state->shm_perm.uid = state->shm_perm.cuid = geteuid();
		state->shm_perm.gid = state->shm_perm.cgid = getegid();
		state->shm_perm.mode = 0600;
		state->shm_cpid = getpid();
		return 0;
	}
	vf_fd_close_hidden(segment->fd);
	segment->length_bytes = 0;
	return 0;
}

VF_EXPORT int shmctl(int id, int command, struct shmid_ds *state)
{
	int result;

	if (!is_ours(id))
		return VF_REAL(shmctl)(id, command, state);
	lock();
	result = control(id, command, state);
	unlock();
	return result;
}
