/* SPDX-License-Identifier: Apache-2.0
 *
 * What surrounds the device in the fuzz harness: the driver's memory, a store, an engine that completes in any order,
 * and the invariants. fuzz_memory.c holds the memory, fuzz_world.c the rest, fuzz_input.c reads the input, and fuzz_queue.c
 * plays the driver.
 */
#ifndef FUZZ_WORLD_H
#define FUZZ_WORLD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "queue/queue.h"

#define FUZZ_REGION_MAX 12u
#define FUZZ_QUEUE_MAX 128u
#define FUZZ_CAPACITY_SECTORS 16u

#define FUZZ_ASSERT(condition)                                                                                         \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			fprintf(stderr, "%s:%d: invariant broken: %s\n", __FILE__, __LINE__, #condition);               \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

/* A region of the IOTLB, allocated to its exact size so that the sanitizer sees any access beyond it. */
struct fuzz_region {
	uint64_t start;
	uint32_t len;
	uint32_t perm;
	uint8_t *mem; /* NULL: not there (any longer) */
};

struct fuzz_world {
	struct vf_queue *q;
	struct fuzz_region region[FUZZ_REGION_MAX];
	uint32_t region_count;
	bool failed; /* the ring has been given up */
	bool busy_popped; /* a head in flight was popped again: the round must fail */
	uint16_t last_popped;
	uint16_t order[FUZZ_QUEUE_MAX]; /* heads that are out of a ring with an order, first taken first */
	uint32_t order_count;
	bool async; /* the engine completes later, in any order */
	uint8_t error_every; /* every so many requests the engine reports an error; 0 = never */
	uint32_t request_count;
	uint32_t irq_fail_every;
	uint32_t irq_count;
	uint32_t random; /* of the engine's order */
	uint64_t shared_reads; /* in this round */
	struct {
		bool armed;
		uint8_t where; /* 0: what is about to be read, 1: what was read last, 2: a region, 3: a page vanishes */
		uint8_t width;
		uint32_t countdown; /* reads until it happens */
		uint32_t region;
		uint32_t offset;
		uint64_t value;
	} mutation[4];
};

extern struct fuzz_world world;

/* Input: bytes in sequence, then zeroes. */
void fuzz_input_set(const uint8_t *data, size_t size);
bool fuzz_input_left(void);
uint8_t fuzz_u8(void);
uint16_t fuzz_u16(void);
uint32_t fuzz_u32(void);
uint64_t fuzz_u64(void);

/* Memory of the driver; addresses that no region holds are ignored. */
uint32_t fuzz_region_add(uint64_t start, uint32_t len, uint32_t perm);
void fuzz_region_remove(uint32_t index);
void fuzz_write(uint64_t iova, const void *from, size_t len);
/* The region that holds len bytes at an address of ours; NULL: none. */
struct fuzz_region *fuzz_region_of_address(const void *address, size_t len);
/* Forget what was read last: it belongs to the previous input. */
void fuzz_memory_forget(void);

void fuzz_world_open(uint8_t which_queue, uint8_t device_bits);
void fuzz_world_round(void);
void fuzz_world_drain(void);
void fuzz_world_crash(void);
void fuzz_world_fail(int err);
void fuzz_world_close(void);

#endif
