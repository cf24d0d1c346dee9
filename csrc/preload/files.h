/* SPDX-License-Identifier: Apache-2.0
 *
 * Which descriptors of this process are the disk. A program that opens the stand-in path gets an O_PATH descriptor: each
 * call that this library does not intercept fails on it with EBADF.
 *
 * Behind such a descriptor is a memfd with the state that POSIX calls the open file description: flags and position. The
 * kernel counts its users: dup, fork, exec and SCM_RIGHTS hand it on, and a process that starts with one finds it.
 */
#ifndef VF_FILES_H
#define VF_FILES_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

#include "base/barrier.h"

#define VF_FD_COUNT 65536u /* a descriptor that is the disk is below this number */
#define VF_FILE_COUNT 4096u /* open file descriptions of a process */

/* Shared by all processes that have it open: read once. */
struct vf_description {
	uint64_t magic;
	uint64_t stand_in_dev;
	uint64_t stand_in_ino;
	uint64_t position_bytes;
	uint32_t flags; /* as F_GETFL returns them */
	uint32_t reserved;
};

/* An open file description in this process. A place in a table, with memory that is always mapped: a thread that uses a
 * descriptor while another closes it reads stale flags, and nothing worse. */
struct vf_file {
	struct vf_description *shared;
	dev_t memfd_dev;
	ino_t memfd_ino;
	uint32_t fd_count; /* under the table's lock */
	int lock_fd; /* a descriptor of the lock file, for flock() and fcntl() locks; -1 before the first */
};

enum { VF_FD_FOREIGN = 0, VF_FD_HIDDEN = 0xffff }; /* else the number of the file */

extern uint16_t vf_fd_files[VF_FD_COUNT];
extern struct vf_file vf_files[VF_FILE_COUNT]; /* number 0 is never used */
extern uint32_t vf_wanted; /* $VDUSEFAST_ATTACH is set */

/* The disk that a descriptor is, or NULL: it is not ours. */
static inline struct vf_file *vf_file_of(int fd)
{
	uint16_t number;

	if (vf_unlikely((uint32_t)fd >= VF_FD_COUNT))
		return NULL;
	number = vf_peek_u16(&vf_fd_files[fd]);
	return vf_likely(number == VF_FD_FOREIGN || number == VF_FD_HIDDEN) ? NULL : &vf_files[number];
}

/* Whether a descriptor belongs to this library: the program does not know of it. */
static inline bool vf_fd_is_hidden(int fd)
{
	return (uint32_t)fd < VF_FD_COUNT && vf_peek_u16(&vf_fd_files[fd]) == VF_FD_HIDDEN;
}

static inline uint32_t vf_file_flags(const struct vf_file *file)
{
	return vf_load_relaxed_u32(&file->shared->flags);
}

/* Whether the socket file of which stat() told this is the stand-in. Attaches. */
bool vf_is_stand_in(const struct stat *st);

/* Open the disk. Returns a descriptor, or -1 with errno. */
int vf_file_open(int flags);

/* Close a descriptor that is the disk, or that was when the caller asked. As close(). */
int vf_file_close(int fd);

/* Note that the kernel has made fd another descriptor of a file: returns fd, or -1 with errno when there are too many,
 * and then has closed it. */
int vf_file_add_fd(struct vf_file *file, int fd);

/* Have to be what from is (either may be foreign), by dup3() with these flags. As dup3(), and dup2() when both are equal. */
int vf_file_dup_over(int from, int to, int flags);

/* The descriptor that holds the file's flock() and fcntl() locks, made at the first call. -1 with errno. */
int vf_file_lock_fd(struct vf_file *file);

/* Forget the disk's descriptors from first to last, as something else closed them or is about to. */
void vf_file_forget_range(uint32_t first, uint32_t last);

/* The file behind a foreign descriptor that names a description's memfd, as of an open() of /dev/fd/3; else NULL. */
struct vf_file *vf_file_of_memfd(int fd);

/* Move a descriptor of this library to a high number and protect it from the program, which may close all that it does
 * not know. Consumes fd and returns the new one; fd itself when there is no room. Raw close()s of it are the owner's. */
int vf_fd_hide(int fd);
void vf_fd_close_hidden(int fd);

/* A descriptor of a lock file that all processes of the disk share, of its own open file description. Hidden. -1 with errno. */
int vf_lock_file_open(void);

#endif
