/* SPDX-License-Identifier: Apache-2.0
 *
 * Errors and delays by rule, for any engine: one engine in front of another, which does not see failed requests.
 */
#ifndef VF_FAULTY_H
#define VF_FAULTY_H

#include "engine/engine.h"

#define VF_FAULT_MAX 16u
#define VF_FAULT_CHANCE_ONE 1000000u
#define VF_FAULT_PATH_BYTES 256u

/* The first rule that fits a request, and whose turn it is, applies. All counts are of requests that fit. */
struct vf_fault {
	uint32_t ops; /* bits 1 << enum vf_op */
	int32_t err; /* positive errno, 0 = the request continues, after the delay */
	uint64_t delay_ns;
	uint64_t start; /* of the bytes that it is about: any overlap fits; flushes always do */
	uint64_t last;
	uint64_t skip; /* so many are left alone first */
	uint64_t every; /* then each one of so many, from the first on; 1 = all */
	uint64_t limit; /* and no more than so many; 0 = no limit */
	uint32_t chance; /* of those, in millionths */
	char path[VF_FAULT_PATH_BYTES]; /* only while there is such a file; "" = always */
	/* The state so far. */
	uint64_t seen;
	uint64_t done;
};

struct vf_faulty;

/* Rules for slot_count requests in flight, in front of an engine that is to be opened at vf_faulty_inner(): engines know
 * their own address. NULL with errno set. */
struct vf_faulty *vf_faulty_new(const struct vf_fault *faults, uint32_t fault_count, uint64_t seed, uint32_t slot_count);
struct vf_engine *vf_faulty_inner(struct vf_faulty *faulty);

/* Make `engine` the rules in front of the inner engine, which is open. Consumes faulty: closing the engine frees it. The
 * order of the ring is not kept from now on, and the inner engine should not merge requests. */
void vf_faulty_attach(struct vf_engine *engine, struct vf_faulty *faulty);

/* Free rules that were not attached, and whose inner engine is not open. */
void vf_faulty_free(struct vf_faulty *faulty);

#endif
