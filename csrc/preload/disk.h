/* SPDX-License-Identifier: Apache-2.0
 *
 * A disk that another process serves, reached through shared virtqueues: all that the interception layer (files.c,
 * calls.c, aio.c) sees of the ring side (disk.c, attach.c). Nothing here knows of descriptors that a program opens, and
 * nothing there knows of rings.
 */
#ifndef VF_DISK_H
#define VF_DISK_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

enum vf_disk_op { VF_DISK_READ, VF_DISK_WRITE, VF_DISK_FLUSH, VF_DISK_DISCARD, VF_DISK_WRITE_ZEROES };

struct vf_disk_info {
	const char *path; /* the stand-in: the file that a program opens; it is the attach socket itself */
	dev_t stand_in_dev; /* of that socket file, to know it by any name */
	ino_t stand_in_ino;
	uint64_t capacity_bytes; /* when attached; vf_disk_capacity() follows a resize */
	const uint64_t *capacity_at; /* where it reads; NULL: only it knows */
	uint32_t block_bytes; /* logical block: offset and length of every request are multiples */
	uint32_t physical_block_bytes;
	uint32_t io_min_bytes, io_opt_bytes; /* 0: not known */
	uint32_t queue_count;
	uint64_t discard_max_bytes, discard_granularity_bytes; /* 0: no discard */
	uint64_t write_zeroes_max_bytes; /* 0: no write zeroes */
	bool read_only;
	char serial[21];
};

/* Attach this process to the disk of $VDUSEFAST_ATTACH, the path of the stand-in. NULL with errno: ENOENT when the variable
 * is not set, ENXIO when the disk cannot be reached (one line on stderr has said why). Cheap when called again, and the
 * pointer stays valid. After fork() the child attaches by itself, at its first user. */
const struct vf_disk_info *vf_disk_attach(void);
uint64_t vf_disk_capacity(void);

/* Whether a descriptor is ours: close(), close_range() and dup2() of a program must leave it alone. */
bool vf_disk_owns_fd(int fd);

/* One request. The caller owns it, the vector, and the memory that it names, until `done` has been called. offset and length
 * are multiples of the block, inside the capacity (checked by the caller). length may exceed what one virtio request
 * carries: it is cut, and finished once. The vectors' sum is the length. */
struct vf_disk_io {
	enum vf_disk_op op;
	uint32_t iov_count;
	union {
		const struct iovec *iov; /* NULL for flush, discard, write zeroes */
		void *memory; /* of vf_disk_put() */
	};
	uint64_t offset_bytes;
	uint64_t length_bytes; /* 0 for a flush */
	int64_t result; /* length_bytes, or a negative errno */
	void (*done)(struct vf_disk_io *io); /* called in the thread that reaps; must not block, may submit */
	/* of disk.c: */
	uint64_t sent_bytes;
	uint64_t iova_delta; /* what to add to an address of the vector for the device's, if it is direct */
	size_t iov_used_bytes; /* of the entry where the next piece begins */
	uint32_t iov_index; /* that entry */
	uint32_t pieces_left; /* in flight */
	uint32_t way; /* enum vf_io_way */
	uint32_t generation; /* of memory that the device reaches, when the way was chosen */
	struct vf_disk_io *next;
};

/* A user of the disk: one AIO context, or one thread's synchronous calls. Has a queue of its own where there are enough, and
 * shares one where not. One thread at a time uses it (the caller's lock, where there can be several). */
struct vf_disk_user;
struct vf_disk_user *vf_disk_user_new(void); /* NULL with errno: EAGAIN when there are too many, ENXIO when the disk is gone */
void vf_disk_user_free(struct vf_disk_user *user); /* waits for requests in flight; after fork() it only frees */

/* Queue a request in the user's own list: 0, -EIO when the disk is gone, or -ESHUTDOWN for a user from before fork().
 * vf_disk_publish() shows it to the device, as does a reap. What finds no room waits in that list. */
int vf_disk_submit(struct vf_disk_user *user, struct vf_disk_io *io);
void vf_disk_publish(struct vf_disk_user *user);

/* The fast way of a user that is alone on its queue. Publish requests, linked by `next`, that are of one entry of a vector in
 * aligned memory, which is named by `memory` in place of the vector; `result` is the length already. Returns the first that is not sent, with those after it: they go by
 * vf_disk_submit(), with a vector. NULL: all are. Not for a user from before fork(). */
struct vf_disk_io *vf_disk_put(struct vf_disk_user *user, struct vf_disk_io *first);

/* Take up to max (1 at least) requests that have finished well, of those that vf_disk_put() may have sent: `done` is not called
 * for them. Returns them linked by `next`; NULL says nothing of the others. */
struct vf_disk_io *vf_disk_take(struct vf_disk_user *user, uint32_t max);

/* Finish requests: calls `done` of up to max. Waits until at least min are finished, for timeout_ns at most (-1: for
 * ever; 0: not at all), and no longer than the user has requests. Returns how many, -EINTR when a signal handler ran and
 * none was finished, or -ESHUTDOWN as above. */
int vf_disk_reap(struct vf_disk_user *user, uint32_t min, uint32_t max, int64_t timeout_ns);

/* Memory that the program has made shared and anonymous, now a memfd of ours: the device reaches it without a copy. Called
 * by the interceptor of mmap; the first request from it registers it. Consumes fd. Requests from any other memory are
 * copied through buffers of the disk. remove: for a part of it, too, before munmap or a mapping over it. */
void vf_disk_memory_add(void *address, size_t length, int fd, off_t offset);
void vf_disk_memory_remove(void *address, size_t length);

#endif
