/* SPDX-License-Identifier: Apache-2.0 */
#undef _FORTIFY_SOURCE
#define _GNU_SOURCE
#include "preload/files.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/page.h"
#include "preload/disk.h"
#include "preload/forked.h"
#include "preload/lock.h"
#include "preload/real.h"
#include "preload/signals.h"
#include "preload/streams.h"

#define VF_DESCRIPTION_MAGIC 0x6b73696466767376u /* "vsvfdisk" */
#define MEMFD_NAME "vdusefast-disk"
#define MEMFD_LINK "/memfd:" MEMFD_NAME
#define HIDDEN_FD_MIN 512

uint16_t vf_fd_files[VF_FD_COUNT];
struct vf_file vf_files[VF_FILE_COUNT];
uint32_t vf_wanted;

static uint32_t table_lock;
static uint8_t *descriptions; /* a page for each file, at fixed addresses */
static uint32_t file_count_used = 1; /* no file from this number on has been used */

/* All system calls here are raw: they neither come back to us nor are points of cancellation, as we hold the lock. Signals
 * are blocked meanwhile: a handler may call open(), close() or dup(). */
static void lock_table(uint64_t *old_mask)
{
	vf_signals_block(old_mask);
	vf_lock_take(&table_lock);
}

static void unlock_table(const uint64_t *old_mask)
{
	vf_lock_leave(&table_lock);
	vf_signals_restore(old_mask);
}

static uint64_t fork_mask;

static void before_fork(void)
{
	lock_table(&fork_mask);
}

static void after_fork(void)
{
	uint64_t mask = fork_mask;

	unlock_table(&mask);
}

static void after_fork_unprepared(void)
{
	vf_store_relaxed_u32(&table_lock, VF_LOCK_FREE); /* of a thread that does not exist here */
}

bool vf_is_stand_in(const struct stat *st)
{
	const struct vf_disk_info *info;

	if (!S_ISSOCK(st->st_mode))
		return false;
	info = vf_disk_attach();
	return info && st->st_dev == info->stand_in_dev && st->st_ino == info->stand_in_ino;
}

static void close_raw(int fd)
{
	int kept_errno = errno;

	syscall(SYS_close, fd);
	errno = kept_errno;
}

static int open_link(int fd, int flags)
{
	char path[32];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return (int)syscall(SYS_openat, AT_FDCWD, path, flags, 0);
}

/* Map the description in a memfd (consumed in any case) as a file of the table, which is locked. NULL with errno. */
static struct vf_file *take_memfd(int memfd)
{
	uint32_t page_bytes = vf_page_bytes();
	struct vf_file *file = NULL;
	uint32_t number;
	struct stat st;
	void *at;

	if (syscall(SYS_fcntl, memfd, F_GETFD) < 0 || fstat(memfd, &st) < 0)
		goto out;
	for (number = 1; number < file_count_used; number++) {
		file = &vf_files[number];
		if (file->fd_count && file->memfd_ino == st.st_ino && file->memfd_dev == st.st_dev)
			goto out;
	}
	for (number = 1; number < file_count_used && vf_files[number].fd_count; number++)
		;
	file = NULL;
	if (number == VF_FILE_COUNT) {
		errno = ENFILE;
		goto out;
	}
	if (!descriptions) {
		at = (void *)syscall(SYS_mmap, NULL, (size_t)VF_FILE_COUNT * page_bytes, PROT_NONE,
				     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (at == MAP_FAILED)
			goto out;
		descriptions = at;
	}
	at = (void *)syscall(SYS_mmap, descriptions + (size_t)number * page_bytes, page_bytes, PROT_READ | PROT_WRITE,
			     MAP_SHARED | MAP_FIXED, memfd, 0);
	if (at == MAP_FAILED)
		goto out;
	file = &vf_files[number];
	*file = (struct vf_file){ .shared = at, .memfd_dev = st.st_dev, .memfd_ino = st.st_ino, .lock_fd = -1 };
	if (number == file_count_used)
		file_count_used++;
out:
	close_raw(memfd);
	return file;
}

/* Out of the way of a program that expects the lowest number. fd itself where there is no room. */
static int move_high(int fd)
{
	int high = (int)syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, (long)HIDDEN_FD_MIN);

	if (high < 0)
		return fd;
	close_raw(fd);
	return high;
}

/* A memfd with a new description, to be sealed at that size: no process can make another's access fail. */
static int make_memfd(const struct vf_disk_info *info, int flags)
{
	struct vf_description description = {
		.magic = VF_DESCRIPTION_MAGIC,
		.stand_in_dev = info->stand_in_dev,
		.stand_in_ino = info->stand_in_ino,
		.flags = (uint32_t)flags & ~(uint32_t)(O_CREAT | O_EXCL | O_NOCTTY | O_TRUNC | O_CLOEXEC | O_NOFOLLOW),
	};
	int memfd = (int)syscall(SYS_memfd_create, MEMFD_NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING);

	if (memfd < 0)
		return -1;
	if (syscall(SYS_ftruncate, memfd, (long)vf_page_bytes()) < 0 ||
	    syscall(SYS_pwrite64, memfd, &description, sizeof(description), 0L) != sizeof(description) ||
	    syscall(SYS_fcntl, memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) {
		close_raw(memfd);
		return -1;
	}
	return move_high(memfd);
}

static void set_fd(int fd, uint16_t number)
{
	vf_store_release_u16(&vf_fd_files[fd], number);
}

static uint16_t number_of(const struct vf_file *file)
{
	return (uint16_t)(file - vf_files);
}

/* The table is locked. Closes fd when it is too high. */
static int add_fd_locked(struct vf_file *file, int fd)
{
	if ((uint32_t)fd >= VF_FD_COUNT) {
		close_raw(fd);
		errno = EMFILE;
		return -1;
	}
	set_fd(fd, number_of(file));
	file->fd_count++;
	return fd;
}

/* The table is locked. Forgets what fd was. */
static void drop_fd_locked(int fd)
{
	struct vf_file *file = vf_file_of(fd);

	if (!file)
		return;
	set_fd(fd, VF_FD_FOREIGN);
	if (!--file->fd_count && file->lock_fd >= 0) {
		vf_fd_close_hidden(file->lock_fd);
		file->lock_fd = -1;
	}
}

int vf_file_open(int flags)
{
	const struct vf_disk_info *info = vf_disk_attach();
	struct vf_file *file;
	uint64_t mask;
	int memfd, fd;

	if (!info) {
		errno = ENXIO;
		return -1;
	}
	lock_table(&mask);
	fd = -1;
	memfd = make_memfd(info, flags);
	if (memfd < 0)
		goto out;
	fd = open_link(memfd, O_PATH | (flags & O_CLOEXEC));
	file = take_memfd(memfd);
	if (fd >= 0 && !file) {
		close_raw(fd);
		fd = -1;
	}
	if (fd >= 0)
		fd = add_fd_locked(file, fd);
out:
	unlock_table(&mask);
	return fd;
}

int vf_file_close(int fd)
{
	uint64_t mask;
	int result;

	lock_table(&mask);
	drop_fd_locked(fd);
	result = (int)syscall(SYS_close, fd);
	unlock_table(&mask);
	return result;
}

int vf_file_add_fd(struct vf_file *file, int fd)
{
	uint64_t mask;

	lock_table(&mask);
	fd = add_fd_locked(file, fd);
	unlock_table(&mask);
	return fd;
}

int vf_file_dup_over(int from, int to, int flags)
{
	struct vf_file *file, *over;
	uint64_t mask;
	int result;

	lock_table(&mask);
	file = vf_file_of(from);
	over = vf_file_of(to);
	if (file && (uint32_t)to >= VF_FD_COUNT) {
		errno = EBADF;
		result = -1;
		goto out;
	}
	if (over)
		set_fd(to, VF_FD_FOREIGN);
	result = (int)syscall(SYS_dup3, from, to, flags);
	if (over) {
		set_fd(to, number_of(over));
		if (result >= 0)
			drop_fd_locked(to);
	}
	if (file && result >= 0)
		add_fd_locked(file, to);
out:
	unlock_table(&mask);
	return result;
}

void vf_file_forget_range(uint32_t first, uint32_t last)
{
	uint64_t mask;

	lock_table(&mask);
	for (uint32_t fd = first; fd <= last && fd < VF_FD_COUNT; fd++)
		drop_fd_locked((int)fd);
	unlock_table(&mask);
}

struct vf_file *vf_file_of_memfd(int fd)
{
	struct vf_file *found = NULL;
	struct stat st;
	uint64_t mask;

	lock_table(&mask);
	if (file_count_used > 1 && !fstat(fd, &st))
		for (uint32_t number = 1; number < file_count_used && !found; number++) {
			struct vf_file *file = &vf_files[number];

			if (file->fd_count && file->memfd_ino == st.st_ino && file->memfd_dev == st.st_dev)
				found = file;
		}
	unlock_table(&mask);
	return found;
}

int vf_fd_hide(int fd)
{
	fd = move_high(fd);
	if ((uint32_t)fd < VF_FD_COUNT)
		set_fd(fd, VF_FD_HIDDEN);
	return fd;
}

void vf_fd_close_hidden(int fd)
{
	if ((uint32_t)fd < VF_FD_COUNT)
		set_fd(fd, VF_FD_FOREIGN);
	close_raw(fd);
}

int vf_lock_file_open(void)
{
	const struct vf_disk_info *info = vf_disk_attach();
	char path[4096];
	int fd;

	if (!info || (size_t)snprintf(path, sizeof(path), "%s.lock", info->path) >= sizeof(path)) {
		errno = ENOLCK;
		return -1;
	}
	fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	return fd < 0 ? -1 : vf_fd_hide(fd);
}

int vf_file_lock_fd(struct vf_file *file)
{
	uint64_t mask;
	int fd;

	lock_table(&mask);
	if (file->lock_fd < 0)
		file->lock_fd = vf_lock_file_open();
	fd = file->lock_fd;
	unlock_table(&mask);
	return fd;
}

/* Whether an inherited descriptor is the disk, and if so take it. */
static void take_inherited(int fd)
{
	const struct vf_disk_info *info;
	struct vf_file *file;
	char path[32], link[sizeof(MEMFD_LINK)];
	uint64_t mask;
	long flags = syscall(SYS_fcntl, fd, F_GETFL);
	int memfd;

	if (flags < 0 || !(flags & O_PATH) || (uint32_t)fd >= VF_FD_COUNT)
		return;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	if (syscall(SYS_readlinkat, AT_FDCWD, path, link, sizeof(link)) != sizeof(link) ||
	    memcmp(link, MEMFD_LINK " ", sizeof(link)) != 0)
		return;
	info = vf_disk_attach();
	if (!info)
		return; /* it has said so */
	lock_table(&mask);
	memfd = open_link(fd, O_RDWR | O_CLOEXEC);
	file = memfd < 0 ? NULL : take_memfd(memfd);
	if (file && file->shared->magic == VF_DESCRIPTION_MAGIC && file->shared->stand_in_dev == info->stand_in_dev &&
	    file->shared->stand_in_ino == info->stand_in_ino)
		add_fd_locked(file, fd);
	unlock_table(&mask);
}

struct directory_entry {
	uint64_t ino;
	int64_t next;
	uint16_t length_bytes;
	uint8_t type;
	char name[];
};

static void take_all_inherited(void)
{
	union {
		struct directory_entry alignment;
		char bytes[4096];
	} entries;
	int directory = (int)syscall(SYS_openat, AT_FDCWD, "/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
	long count;

	if (directory < 0)
		return;
	while ((count = syscall(SYS_getdents64, directory, entries.bytes, sizeof(entries))) > 0)
		for (long at = 0; at < count;) {
			const struct directory_entry *entry = (const void *)(entries.bytes + at);

			if (entry->name[0] != '.')
				take_inherited(atoi(entry->name));
			at += entry->length_bytes;
		}
	close_raw(directory);
}

__attribute__((constructor)) static void start(void)
{
	if (!getenv("VDUSEFAST_ATTACH"))
		return;
	vf_store_relaxed_u32(&vf_wanted, 1);
	pthread_atfork(before_fork, after_fork, after_fork);
	vf_fork_when_unprepared(after_fork_unprepared);
	take_all_inherited();
	vf_streams_start();
}
