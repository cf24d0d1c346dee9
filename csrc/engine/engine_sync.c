/* SPDX-License-Identifier: Apache-2.0
 *
 * Engines that finish a request within submit(): sync (preadv, pwritev), memory (a mapping), null (nothing moves) and
 * fail (every request is an error).
 */
#include "engine/merge.h"

#include <errno.h>

static int vf_engine_start(struct vf_engine *engine, const struct vf_engine_ops *ops, void *context,
			   const struct vf_store *store, uint32_t slot_count)
{
	int err;

	*engine = (struct vf_engine){ .store = *store, .context = context };
	err = vf_store_open(&engine->store);
	if (err)
		return err;
	err = ops->open ? ops->open(engine, slot_count) : 0;
	if (err) {
		vf_store_close(&engine->store);
		return err;
	}
	engine->ops = ops;
	return 0;
}

int vf_engine_open(struct vf_engine *engine, const struct vf_engine_ops *ops, const struct vf_store *store,
		   uint32_t slot_count)
{
	return vf_engine_start(engine, ops, NULL, store, slot_count);
}

int vf_engine_open_plugin(struct vf_engine *engine, const struct vf_engine_plugin *plugin, const struct vf_store *store,
			  uint32_t slot_count)
{
	if (!vf_engine_plugin_fits(plugin))
		return -EPROTO;
	return vf_engine_start(engine, plugin->ops, plugin->context, store, slot_count);
}

void vf_engine_close(struct vf_engine *engine)
{
	if (!engine->ops)
		return;
	if (engine->ops->close)
		engine->ops->close(engine);
	vf_store_close(&engine->store);
	engine->ops = NULL;
}

static int vf_sync_open(struct vf_engine *engine, uint32_t slot_count)
{
	int err = vf_merge_open(engine, slot_count);

	if (!err)
		err = vf_begun_open(engine, slot_count);
	if (err)
		vf_merge_close(engine);
	else
		vf_store_map(&engine->store);
	return err;
}

static void vf_sync_close(struct vf_engine *engine)
{
	vf_begun_close(engine);
	vf_merge_close(engine);
}

static int vf_sync_one(struct vf_engine *engine, struct vf_req *req)
{
	if (vf_unlikely(req->op == VF_OP_DISCARD || req->op == VF_OP_WRITE_ZEROES))
		return vf_begun_submit(engine, req);
	req->result = vf_store_do(&engine->store, req);
	return 1;
}

static int vf_sync_submit(struct vf_engine *engine, struct vf_req *req)
{
	return vf_merge_submit(engine, req, vf_sync_one, 0);
}

static void vf_sync_flush(struct vf_engine *engine)
{
	if (engine->merge && engine->merge->held_count)
		vf_merge_flush(engine, vf_sync_one, 0);
}

static uint32_t vf_sync_reap(struct vf_engine *engine, struct vf_req **done, uint32_t max)
{
	uint32_t count = engine->merge ? vf_merge_reap(engine, done, max) : 0;

	return count + vf_begun_reap(engine, done + count, max - count);
}

/* After a flush only ranges are unfinished, and they continue at each reap(): there is nothing to wait for. */
static void vf_sync_wait(struct vf_engine *engine)
{
	vf_sync_flush(engine);
	(void)vf_begun_is_idle(engine);
}

static int vf_sync_sleep(struct vf_engine *engine, const int *fds, uint32_t count, int timeout_ms)
{
	(void)fds;
	(void)count;
	(void)timeout_ms;
	vf_sync_flush(engine);
	(void)vf_begun_is_idle(engine);
	return 0;
}

static int vf_null_submit(struct vf_engine *engine, struct vf_req *req)
{
	(void)engine;
	req->result = 0;
	return 1;
}

static int vf_fail_submit(struct vf_engine *engine, struct vf_req *req)
{
	(void)engine;
	req->result = -EIO;
	return 1;
}

const struct vf_engine_ops vf_engine_sync = {
	.name = "sync",
	.stores = VF_SERVES_FILES,
	.open = vf_sync_open,
	.submit = vf_sync_submit,
	.flush = vf_sync_flush,
	.reap = vf_sync_reap,
	.wait = vf_sync_wait,
	.sleep = vf_sync_sleep,
	.close = vf_sync_close,
	.publish_batch = 4,
	.blocks = 1,
};

const struct vf_engine_ops vf_engine_memory = {
	.name = "memory",
	.stores = 1u << VF_STORE_MEMORY,
	.open = vf_begun_open,
	.submit = vf_sync_one,
	.flush = vf_sync_flush,
	.reap = vf_sync_reap,
	.wait = vf_sync_wait,
	.sleep = vf_sync_sleep,
	.close = vf_begun_close,
	.publish_batch = 8,
	.instant = 1,
};

const struct vf_engine_ops vf_engine_null = {
	.name = "null",
	.stores = 1u << VF_STORE_NULL,
	.submit = vf_null_submit,
	.publish_batch = 16,
	.instant = 1,
};

const struct vf_engine_ops vf_engine_fail = {
	.name = "fail",
	.stores = UINT8_MAX,
	.submit = vf_fail_submit,
	.publish_batch = 16,
	.instant = 1,
};
