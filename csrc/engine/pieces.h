/* SPDX-License-Identifier: Apache-2.0
 *
 * Discards and writes of zeroes, piece by piece. One request may cover up to 2 GiB. The kernel carries that out in one call,
 * which blocks its caller, and meanwhile reads of every queue may wait for a lock of the file or device. So an engine does a
 * piece, serves other requests, and does the next piece.
 *
 * Each piece takes about VF_PIECE_NS: its size follows from the time of the last ones. A store frees whole units only, so pieces
 * end where such a unit does. If the worker dies, the request is replayed from its start. That is safe: the pieces done
 * before do not change, and the driver does not write there before the request is complete.
 */
#ifndef VF_PIECES_H
#define VF_PIECES_H

#include <stdint.h>

struct vf_engine;
struct vf_req;
struct vf_store;

#define VF_PIECE_NS 10000000u
#define VF_PIECE_BURST_NS (2u * VF_PIECE_NS)
#define VF_PIECE_MIN_BYTES (256u << 10)
#define VF_PIECE_FIRST_BYTES (4u << 20)
#define VF_PIECE_MAX_BYTES (16u << 20)
#define VF_PIECE_RING_BYTES (16u << 20) /* of calls that do not block their caller, but may hold such a lock */

/* Of a store. */
struct vf_pieces {
	uint64_t unit_bytes; /* what the store frees at a time; 0 = any number of bytes */
	uint64_t offset_bytes; /* where a unit begins: others do at multiples of unit_bytes from there, before it and after it */
	uint64_t bytes; /* of the next piece */
	uint64_t last_bytes; /* of the previous piece, and how long it took */
	uint64_t last_ns;
};

/* The bytes of the next piece, about `wanted`. All but the first begin where a unit does, and all but the last end where one does. */
uint64_t vf_piece_bytes(const struct vf_pieces *pieces, const struct vf_req *req, uint64_t wanted);

/* The requests that an engine has begun, or is to begin; each gets its turn. Pieces use at most half of the time, unless there
 * is nothing else to do, and at most VF_PIECE_BURST_NS of it at once. Small requests wait for larger ones only. */
struct vf_begun {
	uint32_t slot_count;
	uint32_t head;
	uint32_t count;
	uint8_t idle; /* the engine has nothing else to do */
	uint64_t even_ns; /* when other requests will have had as much time as pieces */
	struct vf_req *req[]; /* slot_count places */
};

/* Set engine->begun; 0 or -ENOMEM. */
int vf_begun_open(struct vf_engine *engine, uint32_t slot_count);
void vf_begun_close(struct vf_engine *engine);

/* As submit() of an engine, by vf_store_do(). */
int vf_begun_submit(struct vf_engine *engine, struct vf_req *req);

/* Do a piece, if it is time for one; called by a reap() that has found nothing else. Returns as reap(). */
uint32_t vf_begun_reap(struct vf_engine *engine, struct vf_req **done, uint32_t max);

/* Whether there are pieces to do, so that sleep() and wait(), which call this, must not wait. */
int vf_begun_is_idle(struct vf_engine *engine);

#endif
