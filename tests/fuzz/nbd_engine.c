/* SPDX-License-Identifier: Apache-2.0
 *
 * The NBD engine without the rest, under the sanitizers: nbd_engine URI SECONDS SEED [TIMEOUT_MS]. Random requests on a
 * server that may do anything but answer with a lie; every read is compared. Each slot has a part of the export for itself,
 * and memory that nobody may touch while none of its requests is in flight.
 *
 * With TIMEOUT_MS requests may end without an answer. What such a write has left is not known, and not compared.
 *
 * Status 0: all was well. 1: wrong data or an error, which is printed.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "nbd/engine_nbd.h"

#define SLOTS 16u
#define PART_BYTES (256u << 10)
#define SEGMENTS 8u
#define BLOCK 512u

struct slot {
	struct vf_req req;
	struct iovec iov[SEGMENTS];
	uint8_t memory[PART_BYTES + SEGMENTS * 64u];
	uint8_t shadow[PART_BYTES];
	uint64_t at;
	uint32_t len;
	int unknown; /* a write has ended with an error */
};

static struct slot slots[SLOTS];
static uint8_t untouched[sizeof(slots[0].memory)];
static uint64_t verified_count, expired_count;
static int may_expire;

static uint32_t pick(uint32_t limit)
{
	return (uint32_t)(random() % limit);
}

/* Cut the data of a request into segments of odd lengths, with gaps between them. */
static void cut(struct slot *slot)
{
	uint32_t count = slot->len > BLOCK && pick(2) ? 1u + pick(SEGMENTS) : 1u;
	uint32_t left = slot->len;
	uint8_t *place = slot->memory;

	slot->req.iov_count = 0;
	for (uint32_t i = 0; i < count && left; i++) {
		uint32_t len = i + 1u == count ? left : 1u + pick(left);

		slot->iov[slot->req.iov_count++] = (struct iovec){ place, len };
		place += len + 16u;
		left -= len;
	}
	slot->req.iov = slot->iov;
}

/* Copy between the segments as they were cut, in a fresh array, and a flat buffer. */
static void move_data(struct slot *slot, const struct iovec *iov, uint32_t count, uint8_t *flat, int to_segments)
{
	(void)slot;
	for (uint32_t i = 0; i < count; i++) {
		if (to_segments)
			memcpy(iov[i].iov_base, flat, iov[i].iov_len);
		else
			memcpy(flat, iov[i].iov_base, iov[i].iov_len);
		flat += iov[i].iov_len;
	}
}

/* Look whether somebody has written to the memory of a slot without a request, and mark it. */
static int check_memory(struct slot *slot)
{
	if (memcmp(slot->memory, untouched, sizeof(untouched)) == 0)
		return 0;
	printf("memory of slot %ld was written to with no request in flight\n", (long)(slot - slots));
	return 1;
}

static void prepare(uint32_t index)
{
	static const uint8_t ops[] = { VF_OP_READ, VF_OP_READ, VF_OP_READ, VF_OP_WRITE, VF_OP_WRITE,
				       VF_OP_FLUSH, VF_OP_WRITE_ZEROES, VF_OP_DISCARD };
	struct slot *slot = &slots[index];
	uint32_t blocks = PART_BYTES / BLOCK;

	slot->req = (struct vf_req){ .op = ops[pick(sizeof(ops))], .slot = (uint16_t)index, .unmap = (uint8_t)pick(2) };
	slot->at = (uint64_t)pick(blocks) * BLOCK;
	slot->len = (1u + pick(pick(4) ? 16u : blocks)) * BLOCK;
	if (slot->at + slot->len > PART_BYTES)
		slot->len = (uint32_t)(PART_BYTES - slot->at);
	if (slot->req.op == VF_OP_FLUSH)
		return;
	slot->req.offset_bytes = (uint64_t)index * PART_BYTES + slot->at;
	slot->req.left_bytes = slot->len;
	if (slot->req.op == VF_OP_READ || slot->req.op == VF_OP_WRITE)
		cut(slot);
	if (slot->req.op == VF_OP_WRITE) {
		for (uint32_t i = 0; i < slot->len; i++)
			slot->shadow[slot->at + i] = (uint8_t)random();
		move_data(slot, slot->iov, slot->req.iov_count, slot->shadow + slot->at, 1);
	} else if (slot->req.op != VF_OP_READ) {
		memset(slot->shadow + slot->at, 0, slot->len);
	}
}

static int compare(struct slot *slot, const struct iovec *iov, uint32_t count)
{
	static uint8_t flat[PART_BYTES];

	if (may_expire && (slot->req.result == -ETIMEDOUT || slot->req.result == -EIO)) {
		slot->unknown |= slot->req.op != VF_OP_READ && slot->req.op != VF_OP_FLUSH;
		expired_count++;
		return 0;
	}
	if (slot->req.result) {
		printf("op %u at %llu: result %d\n", slot->req.op, (unsigned long long)slot->at, slot->req.result);
		return 1;
	}
	if (slot->req.op != VF_OP_READ)
		return 0;
	move_data(slot, iov, count, flat, 0);
	if (slot->unknown)
		return 0;
	verified_count++;
	if (memcmp(flat, slot->shadow + slot->at, slot->len) == 0)
		return 0;
	printf("wrong data at %llu, %u bytes\n", (unsigned long long)slot->at, slot->len);
	return 1;
}

/* Take note of the end of a request. */
static int check(struct slot *slot, const struct iovec *iov, uint32_t count)
{
	int bad = compare(slot, iov, count);

	memcpy(slot->memory, untouched, sizeof(untouched));
	return bad;
}

int main(int argc, char **argv)
{
	static struct iovec cuts[SLOTS][SEGMENTS];
	static uint32_t cut_counts[SLOTS];
	struct vf_nbd_config config = { .block_size_bytes = BLOCK, .size_bytes = SLOTS * PART_BYTES,
					.reconnect_ns = 60ull * 1000000000u, .hold_fd = -1, .notes_fd = -1 };
	struct vf_engine engine = { .store = { .fd = -1, .kind = VF_STORE_PLUGIN, .size_bytes = SLOTS * PART_BYTES } };
	struct vf_req *done[SLOTS];
	struct vf_nbd_event event;
	struct vf_nbd *nbd;
	uint64_t end_ns;
	uint8_t free_slots[SLOTS];
	uint32_t free_count = SLOTS;
	int bad = 0;

	if (argc < 4)
		return 2;
	config.uri = argv[1];
	if (argc > 4) {
		may_expire = 1;
		config.timeout_ns = (uint64_t)atoi(argv[4]) * 1000000u;
	}
	memset(untouched, 0x7e, sizeof(untouched));
	end_ns = vf_now_ns() + (uint64_t)(atof(argv[2]) * 1e9);
	srandom((unsigned int)atoi(argv[3]));
	nbd = vf_nbd_create(&config);
	if (!nbd)
		return 2;
	engine.context = nbd;
	engine.ops = vf_nbd_plugin(nbd)->ops;
	engine.store.write_flags = (int)pick(2);
	if (engine.ops->open(&engine, SLOTS))
		return 2;
	for (uint32_t i = 0; i < SLOTS; i++) {
		free_slots[i] = (uint8_t)i;
		memcpy(slots[i].memory, untouched, sizeof(untouched));
	}
	while (!bad && (vf_now_ns() < end_ns || engine.inflight_count)) {
		uint32_t count;

		while (free_count && vf_now_ns() < end_ns && pick(8)) {
			uint32_t index = free_slots[--free_count];

			bad |= check_memory(&slots[index]);
			prepare(index);
			memcpy(cuts[index], slots[index].iov, sizeof(cuts[index]));
			cut_counts[index] = slots[index].req.iov_count;
			if (engine.ops->submit(&engine, &slots[index].req)) {
				bad |= check(&slots[index], cuts[index], cut_counts[index]);
				free_slots[free_count++] = (uint8_t)index;
			}
		}
		engine.ops->flush(&engine);
		count = engine.ops->reap(&engine, done, SLOTS);
		for (uint32_t i = 0; i < count; i++) {
			uint32_t index = done[i]->slot;

			bad |= check(&slots[index], cuts[index], cut_counts[index]);
			free_slots[free_count++] = (uint8_t)index;
		}
		if (count == 0)
			engine.ops->sleep(&engine, NULL, 0, 20);
		while (vf_nbd_event_take(vf_nbd_events_of(nbd), &event))
			fprintf(stderr, "%s\n", event.text);
	}
	for (uint32_t i = 0; i < SLOTS && !bad; i++)
		bad |= check_memory(&slots[i]);
	if (!bad)
		engine.ops->close(&engine);
	printf("verified %llu, expired %llu\n", (unsigned long long)verified_count, (unsigned long long)expired_count);
	vf_nbd_destroy(nbd);
	return bad;
}
