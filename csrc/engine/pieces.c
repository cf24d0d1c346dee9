/* SPDX-License-Identifier: Apache-2.0 */
#include "engine/pieces.h"

#include <errno.h>
#include <stdlib.h>

#include "base/clock.h"
#include "engine/engine.h"

uint64_t vf_piece_bytes(const struct vf_pieces *pieces, const struct vf_req *req, uint64_t wanted)
{
	uint64_t unit = pieces->unit_bytes;
	uint64_t beyond;

	if (wanted >= req->left_bytes)
		return req->left_bytes;
	if (!unit)
		return wanted;
	/* How far the piece reaches into its last unit. It cannot overflow: a unit has 32 bits, and an off_t 63. */
	beyond = (req->offset_bytes + wanted + unit - pieces->offset_bytes % unit) % unit;
	/* Cut at the last boundary before that, or at the next one where the whole piece lies within one unit. */
	wanted = beyond < wanted ? wanted - beyond : wanted + unit - beyond;
	return wanted < req->left_bytes ? wanted : req->left_bytes;
}

/* Learn from a piece how large the next one should be. */
static void vf_pieces_learn(struct vf_pieces *pieces, uint64_t bytes, uint64_t took_ns)
{
	uint64_t next = pieces->bytes;

	if (took_ns < VF_PIECE_NS / 2u && bytes >= next)
		next = next < VF_PIECE_MAX_BYTES ? 2u * next : next;
	else if (took_ns > 2u * VF_PIECE_NS && bytes <= next)
		next = next > VF_PIECE_MIN_BYTES ? next / 2u : next;
	/* Half of it has taken as long: each call costs that time, whatever its size. */
	if (next < pieces->bytes && bytes < pieces->last_bytes && took_ns > pieces->last_ns - pieces->last_ns / 4u)
		next = pieces->bytes < VF_PIECE_MAX_BYTES / 4u ? 4u * pieces->bytes : VF_PIECE_MAX_BYTES;
	pieces->bytes = next;
	pieces->last_bytes = bytes;
	pieces->last_ns = took_ns;
}

/* 1: the request is finished, and has its result. */
static int vf_piece_do(struct vf_engine *engine, struct vf_req *req)
{
	struct vf_store *store = &engine->store;
	struct vf_req part = *req;
	struct vf_begun *begun = engine->begun;
	uint64_t began_ns = vf_now_ns(), took_ns;
	uint64_t bytes = vf_piece_bytes(&store->pieces, req, store->pieces.bytes);

	part.left_bytes = bytes;
	req->result = vf_store_do(store, &part);
	req->offset_bytes += bytes;
	req->left_bytes -= bytes;
	took_ns = vf_now_ns() - began_ns;
	vf_pieces_learn(&store->pieces, bytes, took_ns);
	begun->even_ns = (begun->even_ns > began_ns ? begun->even_ns : began_ns) + 2u * took_ns;
	begun->idle = 0;
	return req->result || req->left_bytes == 0;
}

static int vf_begun_is_due(const struct vf_begun *begun)
{
	return begun->idle || vf_now_ns() + VF_PIECE_BURST_NS >= begun->even_ns;
}

int vf_begun_open(struct vf_engine *engine, uint32_t slot_count)
{
	engine->begun = calloc(1, sizeof(*engine->begun) + slot_count * sizeof(engine->begun->req[0]));
	if (!engine->begun)
		return -ENOMEM;
	engine->begun->slot_count = slot_count;
	engine->store.pieces.bytes = VF_PIECE_FIRST_BYTES;
	return 0;
}

void vf_begun_close(struct vf_engine *engine)
{
	free(engine->begun);
	engine->begun = NULL;
}

static void vf_begun_put(struct vf_begun *begun, struct vf_req *req)
{
	uint32_t at = begun->head + begun->count++;

	begun->req[at < begun->slot_count ? at : at - begun->slot_count] = req;
}

static struct vf_req *vf_begun_take(struct vf_begun *begun)
{
	struct vf_req *req = begun->req[begun->head];

	begun->head = begun->head + 1u < begun->slot_count ? begun->head + 1u : 0;
	begun->count--;
	return req;
}

int vf_begun_submit(struct vf_engine *engine, struct vf_req *req)
{
	struct vf_begun *begun = engine->begun;

	int is_small = req->left_bytes <= VF_PIECE_MIN_BYTES;

	if (!begun->count && (is_small || vf_begun_is_due(begun)) && vf_piece_do(engine, req))
		return 1;
	vf_begun_put(begun, req);
	engine->inflight_count++;
	return 0;
}

uint32_t vf_begun_reap(struct vf_engine *engine, struct vf_req **done, uint32_t max)
{
	struct vf_begun *begun = engine->begun;
	struct vf_req *req;

	if (!begun->count || !max || !vf_begun_is_due(begun))
		return 0;
	req = vf_begun_take(begun);
	if (!vf_piece_do(engine, req)) {
		vf_begun_put(begun, req);
		return 0;
	}
	engine->inflight_count--;
	done[0] = req;
	return 1;
}

int vf_begun_is_idle(struct vf_engine *engine)
{
	engine->begun->idle = 1;
	return engine->begun->count != 0;
}
