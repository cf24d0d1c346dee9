/* SPDX-License-Identifier: Apache-2.0
 *
 * An engine: how a worker reaches its store. One file each; the loop knows only this table.
 *
 * A request given to submit() belongs to the engine until submit() has returned 1 or reap() has handed it out; then
 * its result is 0 or -errno. An engine never blocks in submit() for longer than its store does, and holds as many
 * requests as the queue has slots.
 */
#ifndef VF_ENGINE_H
#define VF_ENGINE_H

#include "store.h"

#define VF_WATCH_MAX 4u

struct vf_engine;

struct vf_engine_ops {
	const char *name;
	/* 0 or -errno; on an error nothing is held. */
	int (*open)(struct vf_engine *engine, uint32_t slot_count);
	/* 1: finished. 0: in flight. */
	int (*submit)(struct vf_engine *engine, struct vf_req *req);
	/* Start everything submitted since the last call. NULL where submit() does. */
	void (*flush)(struct vf_engine *engine);
	/* Fill done with at most max finished requests; the count. NULL where submit() always finishes. */
	uint32_t (*reap)(struct vf_engine *engine, struct vf_req **done, uint32_t max);
	/* Block until one is finished, or a signal. NULL as reap. */
	void (*wait)(struct vf_engine *engine);
	/* Block until one is finished, one of count (at most VF_WATCH_MAX) descriptors is readable, or the time is up: 1 then,
	 * else 0. The same descriptors each time. Which of them it was the next reap() puts into `readable`. NULL as reap. */
	int (*sleep)(struct vf_engine *engine, const int *fds, uint32_t count, int timeout_ms);
	void (*close)(struct vf_engine *engine);
	/* A region of the driver's memory has been mapped at va, or is about to be unmapped with nothing in flight. NULL where
	 * that is of no interest. */
	void (*region)(struct vf_engine *engine, void *va, size_t len_bytes, int mapped);
	/* How many completions may wait for each other before the driver is shown them: few when each takes long. */
	uint32_t publish_batch;
	uint8_t blocks; /* submit() may wait for storage */
};

struct vf_engine {
	const struct vf_engine_ops *ops;
	struct vf_store store;
	uint32_t inflight_count;
	uint32_t readable; /* bits of sleep()'s descriptors; the loop clears them */
	void *state; /* the engine's own; owned */
};

extern const struct vf_engine_ops vf_engine_sync;
extern const struct vf_engine_ops vf_engine_uring;
extern const struct vf_engine_ops vf_engine_memory;
extern const struct vf_engine_ops vf_engine_null;
extern const struct vf_engine_ops vf_engine_fail;

/* Open the store and the engine. 0 or -errno; on an error nothing is held. */
int vf_engine_open(struct vf_engine *engine, const struct vf_engine_ops *ops, const struct vf_store *store,
		   uint32_t slot_count);

/* Close both. Nothing is in flight. */
void vf_engine_close(struct vf_engine *engine);

#endif
