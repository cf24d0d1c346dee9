/* SPDX-License-Identifier: Apache-2.0
 *
 * Discards and writes of zeroes are cut where the store's units end: a store frees whole units only, and a cut within one would
 * keep it.
 */
#define _GNU_SOURCE
#include "csrc_unit.h"

#define MIB (1ull << 20)

struct case_of_pieces {
	uint64_t unit, offset, start, len;
};

static const struct case_of_pieces cases[] = {
	{ 0, 0, 512, 100 * MIB },
	{ MIB, 0, 0, 100 * MIB },
	{ MIB, 4096, 512, 100 * MIB },
	{ MIB, 3584, 0, 80 * MIB }, /* units begin at an odd sector */
	{ MIB, 7 * 512, 2 * 512, 8 * MIB },
	{ MIB, 7 * 512, 8 * MIB + 9 * 512, 80 * MIB },
	{ MIB, 5 * MIB + 512, 0, 40 * MIB }, /* an offset of more than a unit */
	{ 192u << 10, 0, 12345u * 512, 77 * MIB }, /* no power of two */
	{ 192u << 10, 512, 12345u * 512, 77 * MIB },
	{ 64 * MIB, MIB, 512, 300 * MIB }, /* larger than a piece */
	{ 64 * MIB, 63 * MIB, 512, 300 * MIB }, /* and the first one begins far behind the start */
	{ MIB, 512u << 10, 0, MIB },
};

static uint64_t within(const struct case_of_pieces *one, uint64_t at)
{
	return one->unit ? (at + one->unit - one->offset % one->unit) % one->unit : 0;
}

/* By the arithmetic alone. */
static void check_cuts(const struct case_of_pieces *one, uint64_t wanted)
{
	struct vf_pieces pieces = { .unit_bytes = one->unit, .offset_bytes = one->offset };
	struct vf_req req = { .op = VF_OP_DISCARD, .offset_bytes = one->start, .left_bytes = one->len };
	uint64_t count_max = 2u + one->len / (wanted / 2u);

	for (uint64_t count = 0; req.left_bytes; count++) {
		uint64_t bytes = vf_piece_bytes(&pieces, &req, wanted);

		CHECK(bytes && bytes <= req.left_bytes && count < count_max);
		CHECK(bytes <= wanted || bytes <= one->unit);
		CHECK(req.offset_bytes == one->start || within(one, req.offset_bytes) == 0);
		req.offset_bytes += bytes;
		req.left_bytes -= bytes;
	}
	CHECK(req.offset_bytes == one->start + one->len);
}

/* By an engine, whose request moves piece by piece. */
static void check_engine(const struct vf_engine_ops *ops, enum vf_store_kind kind, enum vf_op op, const struct case_of_pieces *one)
{
	uint64_t size_bytes = one->start + one->len;
	struct vf_engine engine;
	struct vf_store store = { .fd = memory_fd(size_bytes), .kind = kind, .size_bytes = size_bytes };
	struct vf_req req = { .op = (uint8_t)op, .unmap = 1, .offset_bytes = one->start, .left_bytes = one->len }, *done;
	int is_finished;

	store.pieces.unit_bytes = one->unit;
	store.pieces.offset_bytes = one->offset;
	if (vf_engine_open(&engine, ops, &store, 8) != 0) { /* io_uring is forbidden here */
		CHECK(ops == &vf_engine_uring || ops == &vf_engine_cached);
		close(store.fd);
		return;
	}
	is_finished = engine.ops->submit(&engine, &req);
	for (uint64_t at = one->start; !is_finished; at = req.offset_bytes) {
		CHECK(req.offset_bytes >= at && (req.offset_bytes == one->start || within(one, req.offset_bytes) == 0));
		CHECK(req.left_bytes == size_bytes - req.offset_bytes);
		engine.ops->flush(&engine);
		engine.ops->wait(&engine);
		is_finished = (int)engine.ops->reap(&engine, &done, 1);
	}
	CHECK(req.result == 0 && req.left_bytes == 0 && req.offset_bytes == size_bytes && engine.inflight_count == 0);
	vf_engine_close(&engine);
	close(store.fd);
}

void test_pieces(void)
{
	static const uint64_t wanted[] = { 4096, VF_PIECE_MIN_BYTES, VF_PIECE_FIRST_BYTES, VF_PIECE_MAX_BYTES, VF_PIECE_RING_BYTES };

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		for (size_t j = 0; j < sizeof(wanted) / sizeof(wanted[0]); j++)
			check_cuts(&cases[i], wanted[j]);
		for (uint32_t zeroes = 0; zeroes < 2u; zeroes++) {
			enum vf_op op = zeroes ? VF_OP_WRITE_ZEROES : VF_OP_DISCARD;

			check_engine(&vf_engine_sync, VF_STORE_FILE, op, &cases[i]);
			check_engine(&vf_engine_memory, VF_STORE_MEMORY, op, &cases[i]);
			check_engine(&vf_engine_uring, VF_STORE_FILE, op, &cases[i]);
			check_engine(&vf_engine_cached, VF_STORE_FILE, op, &cases[i]);
		}
	}
}
