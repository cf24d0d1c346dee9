/* SPDX-License-Identifier: Apache-2.0
 *
 * A user of the disk, as disk.c and wait.c know it.
 */
#ifndef VF_USER_H
#define VF_USER_H

#include "base/clock.h"
#include "preload/attach.h"
#include "preload/pieces.h"

struct vf_disk_user {
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

static inline bool vf_user_lock(struct vf_disk_user *user, struct vf_board_queue *queue)
{
	return vf_likely(vf_lock_try(queue, user->number)) ||
	       vf_lock_wait(queue, user->number, vf_client_is_gone, user->client);
}

/* Wait until there may be something to reap: until the deadline (0: none), and for a moment at most. 0 or -EINTR. */
int vf_user_wait(struct vf_disk_user *user, uint64_t deadline_ns);

#endif
