/* SPDX-License-Identifier: Apache-2.0
 *
 * An engine: how a worker reaches its store. One file each; the loop knows only this table.
 *
 * A request passed to submit() belongs to the engine until submit() returns 1 or reap() returns it. Then its result is 0
 * or -errno. An engine never blocks in submit() for longer than its store does, and has room for as many requests as the
 * queue has slots.
 */
#ifndef VF_ENGINE_H
#define VF_ENGINE_H

#include "engine/store.h"

#define VF_WATCH_MAX 4u

struct vf_engine;
struct vf_mapping;
struct vf_merge;
struct vf_begun;

#define VF_SERVES_FILES (1u << VF_STORE_FILE | 1u << VF_STORE_BLOCKDEV)

struct vf_engine_ops {
	const char *name;
	/* 0 or -errno; on an error nothing is held. */
	int (*open)(struct vf_engine *engine, uint32_t slot_count);
	/* 1: finished. 0: in flight. */
	int (*submit)(struct vf_engine *engine, struct vf_req *req);
	/* Start everything submitted since the last call. NULL if submit() does. */
	void (*flush)(struct vf_engine *engine);
	/* Fill done with at most max finished requests; returns their count. NULL if submit() always finishes. */
	uint32_t (*reap)(struct vf_engine *engine, struct vf_req **done, uint32_t max);
	/* Block until one is finished, or a signal comes. NULL as reap. */
	void (*wait)(struct vf_engine *engine);
	/* Block until one is finished, one of count (at most VF_WATCH_MAX) descriptors is readable, or the time is up: 1 then,
	 * else 0. Each call gets the same descriptors. The next reap() notes the readable ones in `readable`. NULL as reap. */
	int (*sleep)(struct vf_engine *engine, const int *fds, uint32_t count, int timeout_ms);
	void (*close)(struct vf_engine *engine);
	/* A region of the driver's memory has been mapped at va. With mapping NULL it is about to be unmapped, with nothing in
	 * flight. NULL if the engine ignores both. */
	void (*region)(struct vf_engine *engine, void *va, size_t len_bytes, const struct vf_mapping *mapping);
	/* Replace the engine's own mapping of the driver's memory that holds an address with zero pages, because a page of it has
	 * vanished. Async-signal-safe, called in any thread. 0, or -1 when it has none there. NULL where it has no such mappings. */
	int (*zero_pages)(struct vf_engine *engine, uintptr_t address);
	/* How many completions may be published as one batch: few if each takes long. */
	uint32_t publish_batch;
	uint8_t blocks; /* submit() may wait for storage */
	uint8_t instant; /* it never waits */
	uint8_t stores; /* of the core's engines: bits 1 << enum vf_store_kind that it serves */
};

/* A bit of `readable` besides those of sleep()'s descriptors: the engine's module has events for the process around us. */
#define VF_READABLE_EVENTS (1u << 31)

struct vf_engine {
	const struct vf_engine_ops *ops;
	struct vf_store store;
	uint32_t inflight_count;
	uint32_t readable; /* bits of sleep()'s descriptors; the loop clears them */
	uint8_t replaying; /* requests submitted now may have been submitted before, by a dead process */
	uint8_t marks_replays; /* set by open(): the engine uses `replaying`, and submit() never waits */
	uint8_t always; /* set by open(): sleep() is for this engine also while nothing is in flight */
	void *state; /* the engine's own; owned */
	void *context; /* of a module's engine: the module's; borrowed */
	struct vf_merge *merge; /* of engines that merge requests; NULL: they do not */
	struct vf_begun *begun; /* of engines that do discards piece by piece by themselves; NULL: they do not */
};

/* An engine from outside of the core. The sizes show whether it was built with other headers. */
#define VF_ENGINE_ABI 1u
#define VF_ENGINE_CAPSULE "vdusefast.engine" /* what a Python module hands it over in */

struct vf_engine_plugin {
	uint32_t abi; /* VF_ENGINE_ABI */
	uint32_t engine_bytes;
	uint32_t req_bytes;
	const struct vf_engine_ops *ops;
	void *context;
};

#define VF_ENGINE_PLUGIN(plugin_ops, plugin_context) \
	{ .abi = VF_ENGINE_ABI, .engine_bytes = sizeof(struct vf_engine), .req_bytes = sizeof(struct vf_req), \
	  .ops = (plugin_ops), .context = (plugin_context) }

extern const struct vf_engine_ops vf_engine_sync;
extern const struct vf_engine_ops vf_engine_uring;
extern const struct vf_engine_ops vf_engine_cached;
extern const struct vf_engine_ops vf_engine_memory;
extern const struct vf_engine_ops vf_engine_null;
extern const struct vf_engine_ops vf_engine_fail;

/* The engine of the core of that name, or NULL. */
const struct vf_engine_ops *vf_engine_find(const char *name);

/* Open the store and the engine. 0 or -errno; on an error nothing is held. */
int vf_engine_open(struct vf_engine *engine, const struct vf_engine_ops *ops, const struct vf_store *store,
		   uint32_t slot_count);

static inline int vf_engine_plugin_fits(const struct vf_engine_plugin *plugin)
{
	return plugin->abi == VF_ENGINE_ABI && plugin->engine_bytes == sizeof(struct vf_engine) &&
	       plugin->req_bytes == sizeof(struct vf_req);
}

/* The same with an engine from outside; -EPROTO: it was built for another core. */
int vf_engine_open_plugin(struct vf_engine *engine, const struct vf_engine_plugin *plugin, const struct vf_store *store,
			  uint32_t slot_count);

/* Of the uring engine: how much memory is registered, and the -errno by which the kernel refused to pin more, or 0. */
void vf_uring_fixed(const struct vf_engine *engine, uint64_t *registered_bytes, int *refused);

/* Close both. Nothing is in flight. */
void vf_engine_close(struct vf_engine *engine);

#endif
