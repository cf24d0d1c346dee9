/* SPDX-License-Identifier: Apache-2.0
 *
 * The order in which a job visits its blocks: in sequence, in a random order that visits each block once a pass (as fio
 * does unless told norandommap), or drawn each time.
 */
#ifndef VF_DRIVER_SEQ_H
#define VF_DRIVER_SEQ_H

#include <stdbool.h>
#include <stdint.h>

#include "driver/driver_verify.h"

enum vf_drv_order {
	VF_ORDER_SEQUENTIAL,
	VF_ORDER_RANDOM_ONCE,
	VF_ORDER_RANDOM,
};

__extension__ typedef unsigned __int128 vf_u128;

struct vf_drv_seq {
	uint64_t count; /* blocks; at least 1 */
	uint64_t counter; /* place in the pass, below 2^bits */
	uint64_t mask; /* 2^bits - 1, the smallest that is >= count - 1 */
	uint64_t key;
	uint64_t seed;
	uint64_t random; /* state of the generator */
	uint32_t half_bits;
	uint32_t order;
};

/* xorshift64*: the state is never 0. */
static inline uint64_t vf_random64(uint64_t *state)
{
	uint64_t x = *state;
	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	*state = x;
	return x * 0x2545f4914f6cdd1dull;
}

static inline void vf_drv_seq_init(struct vf_drv_seq *seq, uint32_t order, uint64_t count, uint64_t seed)
{
	uint32_t bits = 1;
	while (bits < 63 && (1ull << bits) < count)
		bits++;
	seq->count = count;
	seq->counter = 0;
	seq->mask = (1ull << bits) - 1;
	seq->half_bits = (bits + 1) / 2;
	seq->seed = seed;
	seq->random = vf_mix64(seed + 1) | 1;
	seq->key = vf_mix64(seed ^ 0x5eedull);
	seq->order = order;
}

/* A bijection on numbers of `bits` bits: adding, multiplying by an odd number and xor with a right shift each are one. */
static inline uint64_t vf_drv_seq_permute(const struct vf_drv_seq *seq, uint64_t x)
{
	x = ((x + seq->key) * 0x9e3779b97f4a7c15ull) & seq->mask;
	x ^= x >> seq->half_bits;
	x = (x * 0xbf58476d1ce4e5b9ull + (seq->key >> 32)) & seq->mask;
	x ^= x >> seq->half_bits;
	x = (x * 0x94d049bb133111ebull) & seq->mask;
	return x ^ (x >> seq->half_bits);
}

/* The next block, below count. Wraps for ever; each pass of a random order is another one. */
static inline uint64_t vf_drv_seq_next(struct vf_drv_seq *seq)
{
	if (seq->order == VF_ORDER_RANDOM)
		return (uint64_t)(((vf_u128)vf_random64(&seq->random) * seq->count) >> 64);
	if (seq->order == VF_ORDER_SEQUENTIAL) {
		uint64_t block = seq->counter++;
		if (seq->counter == seq->count)
			seq->counter = 0;
		return block;
	}
	/* More than half of the numbers of `bits` bits are blocks, so this takes less than two turns on average, and at most
	 * 2^(bits - 1) before a block comes, as all of them come in a pass. */
	for (;;) {
		uint64_t block = vf_drv_seq_permute(seq, seq->counter);
		seq->counter = (seq->counter + 1) & seq->mask;
		if (seq->counter == 0)
			seq->key = vf_mix64(seq->key + seq->seed);
		if (block < seq->count)
			return block;
	}
}

#endif
