/* SPDX-License-Identifier: Apache-2.0
 *
 * Blocks that prove themselves: each written block carries a header (where it belongs, which write it came from, a
 * checksum) and a payload made from the same. The data of a read is compared with the last acknowledged write.
 */
#ifndef VF_DRIVER_VERIFY_H
#define VF_DRIVER_VERIFY_H

#include <stdint.h>
#include <string.h>

#include "driver/crc32c.h"

#define VF_BLOCK_MAGIC 0x6b636f6c42746656ull /* "VftBlock" */

/* At the start of every block written with verify=crc32c. The checksum covers the payload, then the other fields. */
struct vf_block_header {
	uint64_t magic;
	uint64_t offset_bytes; /* on the device */
	uint32_t generation; /* counts the writes of one job; the last one acknowledged is the right one */
	uint32_t seed; /* of the job; differs between jobs and runs */
	uint32_t len_bytes;
	uint32_t crc;
};

_Static_assert(sizeof(struct vf_block_header) == 32, "header is the first 32 bytes of a block");

enum vf_drv_verify {
	VF_VERIFY_NONE,
	VF_VERIFY_CRC32C,
	VF_VERIFY_PATTERN,
};

enum vf_drv_fault_kind {
	VF_FAULT_NONE,
	VF_FAULT_STATUS, /* the device answered with an error; found = status byte */
	VF_FAULT_USED_LEN, /* the device reported another number of bytes written than it had to write */
	VF_FAULT_NO_HEADER, /* the block does not start with the magic number */
	VF_FAULT_OFFSET, /* the block belongs elsewhere */
	VF_FAULT_SEED, /* the block was written by another job or an earlier run */
	VF_FAULT_GENERATION, /* the block holds another write than the last one acknowledged */
	VF_FAULT_LENGTH, /* the block was written with another size */
	VF_FAULT_CHECKSUM, /* header and payload do not fit together */
	VF_FAULT_PATTERN, /* found = the first byte that differs; where = its place */
};

struct vf_drv_fault {
	uint32_t kind;
	uint32_t op;
	uint64_t offset_bytes; /* on the device */
	uint64_t expected;
	uint64_t found;
	uint64_t where; /* byte within the block */
};

/* What a block must hold. generation 0: any that checks (written by an earlier job). */
struct vf_block_expect {
	uint64_t offset_bytes;
	uint32_t generation;
	uint32_t seed;
};

static inline uint64_t vf_mix64(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ull;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

/* Fill words that depend on all of offset, generation and seed. Independent steps: the compiler vectorises the loop. */
static inline void vf_fill_words(void *at, uint64_t key, uint64_t word_count)
{
	uint8_t *p = at;
	for (uint64_t i = 0; i < word_count; i++) {
		uint64_t word = (key + i * 0x9e3779b97f4a7c15ull) ^ ((key + i) >> 7);
		memcpy(p + 8 * i, &word, 8);
	}
}

static inline uint32_t vf_block_crc(const void *block, const struct vf_block_header *header)
{
	const uint8_t *p = block;
	uint32_t crc = vf_crc32c(0, p + sizeof(*header), header->len_bytes - sizeof(*header));
	return vf_crc32c(crc, header, sizeof(*header) - sizeof(header->crc));
}

/* Write header and payload into `block` of `len_bytes` (a multiple of 8 above 32). */
static inline void vf_block_fill(void *block, uint32_t len_bytes, const struct vf_block_expect *is)
{
	struct vf_block_header header = { VF_BLOCK_MAGIC, is->offset_bytes, is->generation, is->seed, len_bytes, 0 };
	uint64_t key = vf_mix64(is->offset_bytes ^ ((uint64_t)is->generation << 32 | is->seed));
	vf_fill_words((uint8_t *)block + sizeof(header), key, (len_bytes - sizeof(header)) / 8);
	header.crc = vf_block_crc(block, &header);
	memcpy(block, &header, sizeof(header));
}

static inline int vf_fault_set(struct vf_drv_fault *out, uint32_t kind, uint64_t expected, uint64_t found)
{
	out->kind = kind;
	out->expected = expected;
	out->found = found;
	return -1;
}

/* Returns 0 when `block` holds what is expected, else -1 with kind, expected and found set in `out`. */
static inline int vf_block_check(const void *block, uint32_t len_bytes, const struct vf_block_expect *want,
				 struct vf_drv_fault *out)
{
	struct vf_block_header header;
	memcpy(&header, block, sizeof(header));
	if (header.magic != VF_BLOCK_MAGIC)
		return vf_fault_set(out, VF_FAULT_NO_HEADER, VF_BLOCK_MAGIC, header.magic);
	if (header.len_bytes != len_bytes)
		return vf_fault_set(out, VF_FAULT_LENGTH, len_bytes, header.len_bytes);
	if (header.offset_bytes != want->offset_bytes)
		return vf_fault_set(out, VF_FAULT_OFFSET, want->offset_bytes, header.offset_bytes);
	if (want->generation && header.seed != want->seed)
		return vf_fault_set(out, VF_FAULT_SEED, want->seed, header.seed);
	if (want->generation && header.generation != want->generation)
		return vf_fault_set(out, VF_FAULT_GENERATION, want->generation, header.generation);
	uint32_t crc = vf_block_crc(block, &header);
	if (crc != header.crc)
		return vf_fault_set(out, VF_FAULT_CHECKSUM, header.crc, crc);
	return 0;
}

/* The same for a block full of a repeated pattern, of which `expected` is one whole block. */
static inline int vf_pattern_check(const void *block, const void *expected, uint32_t len_bytes,
				   struct vf_drv_fault *out)
{
	if (memcmp(block, expected, len_bytes) == 0)
		return 0;
	const uint8_t *b = block, *e = expected;
	for (uint32_t i = 0; i < len_bytes; i++)
		if (b[i] != e[i]) {
			out->where = i;
			return vf_fault_set(out, VF_FAULT_PATTERN, e[i], b[i]);
		}
	return vf_fault_set(out, VF_FAULT_PATTERN, 0, 0); /* changed between the two looks */
}

#endif
