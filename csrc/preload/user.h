/* SPDX-License-Identifier: Apache-2.0
 *
 * A user of the disk, as disk.c and wait.c know it.
 */
#ifndef VF_USER_H
#define VF_USER_H

#include "base/clock.h"
#include "preload/attach.h"
#include "preload/pieces.h"

/* How the data of a request reaches the device. */
enum vf_io_way {
	VF_IO_COPIED, /* through buffers of the board */
	VF_IO_DIRECT, /* as it is, in segments */
	VF_IO_PLAIN, /* as it is: one segment, one piece */
};

/* What plain.c needs, side by side. */
struct vf_fast {
	struct vf_board_queue *queue; /* its home */
	struct vf_board_slot *slots;
	struct vf_piece *pieces;
	uint8_t *lines;
	uint16_t *free_slots;
	uint32_t solo_number; /* its number; one that no user has, where it must not take the fast way */
	uint32_t slot_count;
	uint64_t most_bytes; /* of a request */
	uintptr_t start; /* memory that the device reaches: where the last request had its data */
	size_t length; /* 0: none */
	uint64_t delta; /* from an address to the device's */
	uint32_t generation; /* when it was looked up */
	const uint32_t *resets; /* raised by a reset of the device */
	uint32_t seen_resets;
	uint16_t seen_used_idx; /* read from the ring: not again before all up to there is taken, as the device writes there */
};

struct vf_disk_user {
	struct vf_fast fast;
	struct vf_client *client;
	struct vf_board_user *shared;
	uint64_t busy; /* a bit for each queue where it has pieces in flight */
	uint32_t number;
	uint32_t home;
	bool cross; /* requests go to queues by their offset */
	uint32_t spin_fails; /* in a row */
	uint32_t spin_pause; /* waits until spinning is tried again */
	uint64_t requests; /* submitted and not finished */
	struct vf_disk_io *waiting; /* not sent, or not as a whole */
	struct vf_disk_io *waiting_last;
	struct vf_disk_io *ended; /* to be finished by the next reap */
	struct vf_memory_hit hit;
	uint32_t inflight[VF_BOARD_QUEUES_MAX];
};

/* Move the request's place in its vector on by `bytes`. With `copy`, data goes to (write) or from the vector there. */
static inline void vf_iov_walk(const struct vf_disk_io *io, uint32_t *index, size_t *used, uint8_t *copy, uint64_t bytes, bool to_copy)
{
	while (bytes && *index < io->iov_count) {
		const struct iovec *part = &io->iov[*index];
		size_t run = part->iov_len - *used;
		if (run > bytes)
			run = (size_t)bytes;
		if (copy && to_copy)
			memcpy(copy, (const uint8_t *)part->iov_base + *used, run);
		else if (copy)
			memcpy((uint8_t *)part->iov_base + *used, copy, run);
		copy = copy ? copy + run : NULL;
		bytes -= run;
		*used += run;
		if (*used == part->iov_len) {
			++*index;
			*used = 0;
		}
	}
}

/* Fail what is not sent of a request, so that it ends once its pieces have. */
static inline void vf_io_give_up(struct vf_disk_io *io, int error)
{
	if (io->result >= 0)
		io->result = error;
	io->sent_bytes = io->length_bytes;
}

static inline bool vf_user_lock(struct vf_disk_user *user, struct vf_board_queue *queue)
{
	return vf_queue_lock(queue, user->number, vf_client_is_gone, user->client);
}

static inline void vf_user_unlock(struct vf_disk_user *user, struct vf_board_queue *queue)
{
	vf_queue_unlock(queue, user->number);
}

/* Choose how the data of a request goes. */
void vf_io_choose_way(struct vf_disk_user *user, struct vf_disk_io *io);

/* Put what waits on the queues, as far as there is room. */
void vf_user_send(struct vf_disk_user *user);

/* Kick the device, which wants it for what was published. */
void vf_user_kick(struct vf_disk_user *user, uint32_t q);

/* Have a request finished by the next reap. */
void vf_user_finish_later(struct vf_disk_user *user, struct vf_disk_io *io);

/* Wait until there may be something to reap: until the deadline (0: none), and for a moment at most. 0 or -EINTR. */
int vf_user_wait(struct vf_disk_user *user, uint64_t deadline_ns);

#endif
