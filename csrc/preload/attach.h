/* SPDX-License-Identifier: Apache-2.0
 *
 * A process's connection to the server of the disk: the board, the eventfds, and memory that the device reaches.
 *
 * Whatever is here uses system calls directly: the library replaces the functions of the C library, and no wait here may
 * be a cancellation point.
 */
#ifndef VF_ATTACH_H
#define VF_ATTACH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "board/queue.h"
#include "preload/disk.h"

#define VF_ATTACH_PATH_MAX 108u

/* Messages of the attach socket (SOCK_SEQPACKET), requests and answers alike; vdusefast/driver/attach_client.py has the same. */
enum vf_attach_op {
	VF_ATTACH_HELLO = 1, /* a: VF_BOARD_MAGIC. Answer: a: address, b: bytes, fd: the board */
	VF_ATTACH_EVENTS, /* arg: queue. Answer: fds: kick, interrupt */
	VF_ATTACH_NEW_USER, /* b: fences reach the process. Answer: arg: number, a: queue */
	VF_ATTACH_END_USER, /* arg: number. No answer */
	VF_ATTACH_ADD_REGION, /* a: bytes, b: offset, fd. Answer: a: IOVA */
	VF_ATTACH_REMOVE_REGION, /* a: IOVA. No answer */
};

struct vf_attach_message {
	uint32_t op;
	int32_t error; /* 0 or a positive errno */
	uint32_t arg;
	uint32_t reserved;
	uint64_t a;
	uint64_t b;
};

struct vf_piece;

struct vf_client {
	struct vf_board_view view;
	struct vf_board_geometry geometry; /* = view.geometry */
	int socket;
	bool joined; /* fences reach this process: base/membarrier.h */
	uint32_t gone; /* the server has ended */
	uint32_t mute; /* an answer did not come in time: it would be taken for that of the next question */
	uint32_t generation; /* of the eventfds that we have */
	uint32_t empty_reaps;
	uint64_t spin_ns;
	struct vf_client *before_fork; /* of the parent, and so on */
	struct vf_piece *pieces; /* of slot s of queue q: [q * slot_count + s] */
};

/* The client of this process, attached if it was not; NULL with errno. */
struct vf_client *vf_client_get(void);

/* The same if it is attached, without a system call. */
struct vf_client *vf_client_now(void);

/* Whether the server has ended; looks at the socket. */
bool vf_client_is_gone(void *client);

/* Fetch the eventfds again if the device was reset. */
void vf_client_refresh(struct vf_client *client);

/* Ask the server; 0 or -errno. Up to two descriptors come with the answer, -1 where there is none. */
int vf_client_ask(struct vf_client *client, struct vf_attach_message *message, int fd, int fds[2]);

/* Tell the server; it does not answer. */
void vf_client_tell(struct vf_client *client, const struct vf_attach_message *message);

/* Close a descriptor of ours. */
void vf_own_close(int fd);

/* Move a descriptor to where programs have none, and note that it is ours. Consumes fd. -1 with errno. */
int vf_own_take(int fd);

/* What a user remembers of the last lookup: an area, or memory that the device does not reach. */
struct vf_memory_hit {
	uintptr_t start;
	size_t length;
	uint64_t delta;
	uint32_t generation; /* 0: nothing */
	bool reached;
};

extern uint32_t vf_area_generation; /* raised by every change of what the device reaches */

/* Find [address, address + length) in memory that the device reaches, registering it if it can be: true with *delta. */
bool vf_memory_find(struct vf_client *client, struct vf_memory_hit *hit, const void *address, size_t length, uint64_t *delta);

/* After fork(), in the child. */
void vf_memory_forget_regions(void);

/* No handler of a signal runs in a thread that has the lock. again: whether or not another thread has it. */
void vf_memory_lock(void);
void vf_memory_lock_again(void);
void vf_memory_unlock(void);

#endif
