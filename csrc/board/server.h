/* SPDX-License-Identifier: Apache-2.0
 *
 * The server's part of the board: how it is made, what becomes of a client that has ended, and how requests survive a reset of
 * the device. One thread of the server calls these.
 */
#ifndef VF_BOARD_SERVER_H
#define VF_BOARD_SERVER_H

#include "board/queue.h"

/* Make a board in zeroed memory at `address`, which must be where every client maps it. 0 or -EINVAL. */
int vf_server_create(struct vf_board_view *view, void *address, const struct vf_board_geometry *geometry);

/* Bytes of a board with this geometry; 0 when the geometry is no good. */
uint64_t vf_server_bytes(const struct vf_board_geometry *geometry, void *address);

/* Make the rings as a fresh device expects them. All locks are held, or no client is there. */
int vf_server_start_rings(struct vf_board_view *view);

/* Enter a user: its number, or 0 when there are `user_max`. joined: fences reach its process (base/membarrier.h). */
uint32_t vf_server_new_user(struct vf_board_view *view, bool joined);

/* The queue of a user. */
uint32_t vf_server_home(const struct vf_board_view *view, uint32_t number);

/* A user has ended. Call again until it returns 0, with vf_server_reap() in between: so many of its requests are in
 * flight. Its number is free for another then. */
uint32_t vf_server_end_user(struct vf_board_view *view, uint32_t number);

/* Whether the user is the owner of some queue's lock, or works solo on a queue. */
bool vf_server_holds_lock(const struct vf_board_view *view, uint32_t number);

/* Reap every queue on behalf of all users. */
void vf_server_reap(struct vf_board_view *view);

/* Try to take the lock of a queue: 0, or the number of the user that holds it, or works solo there still; call again. */
uint32_t vf_server_lock(struct vf_board_view *view, uint32_t queue);

/* Take a queue over from a user whose process has ended; false when it is not his any more: call vf_server_lock() again. */
bool vf_server_seize(struct vf_board_view *view, uint32_t queue, uint32_t number);

/* For tests: give the lock that the server has to a user, as if it had been killed with it; or as if it had worked solo. */
void vf_server_hold(struct vf_board_view *view, uint32_t queue, uint32_t number, bool solo);

/* After the device was reset, with all locks held: make fresh rings, and put on them what the living had in flight. */
int vf_server_replay(struct vf_board_view *view);

/* Release all locks, kick every queue, and wake every user. */
void vf_server_resume(struct vf_board_view *view);

/* The device is gone: have every client notice at once. */
void vf_server_close(struct vf_board_view *view);

#endif
