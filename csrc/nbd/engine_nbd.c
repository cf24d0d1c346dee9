/* SPDX-License-Identifier: Apache-2.0
 *
 * Translate requests to commands, and replies to completions. A single or large segment is sent from, and received into, the
 * driver's memory itself; small ones share a buffer.
 */
#define _GNU_SOURCE
#include "nbd/internal.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/barrier.h"
#include "base/core_dump.h"

#define VF_NBD_WAIT_MS 100

static uint8_t *vf_nbd_zeroes(const struct vf_nbd *nbd)
{
	return nbd->bounce + (size_t)nbd->slot_count * VF_NBD_BOUNCE_BYTES;
}

/* Free a command's buffer, if it has one. */
static void vf_nbd_release(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	if (cmd->bounce)
		nbd->bounce_free[nbd->bounce_free_count++] = (uint16_t)((size_t)(cmd->bounce - nbd->bounce) / VF_NBD_BOUNCE_BYTES);
	cmd->bounce = NULL;
}

void vf_nbd_take_bounce(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	/* There is one for each slot. */
	cmd->bounce = nbd->bounce + (size_t)nbd->bounce_free[--nbd->bounce_free_count] * VF_NBD_BOUNCE_BYTES;
	cmd->data = cmd->bounce;
}

void vf_nbd_unsend(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	vf_nbd_cmd_disarm(cmd);
	vf_nbd_release(nbd, cmd);
	cmd->sent = 0;
	cmd->is_fetch = 0;
}

void vf_nbd_finish(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd, int result)
{
	uint32_t at = nbd->done_head + nbd->done_count;

	vf_nbd_cmd_disarm(cmd);
	vf_nbd_release(nbd, cmd);
	if (vf_unlikely(cmd->listed))
		vf_nbd_blocks_leave(nbd, cmd);
	cmd->is_fetch = 0;
	nbd->link.withheld_count -= cmd->fate != VF_NBD_FREE;
	cmd->fate = VF_NBD_FREE;
	cmd->is_old = 0;
	cmd->req->result = result;
	nbd->done[at >= nbd->slot_count ? at - nbd->slot_count : at] = cmd->req;
	nbd->done_count++;
	cmd->req = NULL;
	cmd->sent = 0;
}

void vf_nbd_copy(struct vf_nbd_cmd *cmd, int to_segments)
{
	const struct iovec *iov = cmd->req->iov;
	uint8_t *part = cmd->bounce + cmd->skip_bytes;
	size_t done = 0;

	for (uint32_t i = 0; done < cmd->part_bytes; i++) {
		size_t n = iov[i].iov_len < cmd->part_bytes - done ? iov[i].iov_len : cmd->part_bytes - done;

		if (to_segments)
			memcpy(iov[i].iov_base, part + done, n);
		else
			memcpy(part + done, iov[i].iov_base, n);
		done += n;
	}
}

/* Choose how much of a transfer, of which `left` bytes can go, the next command moves, and from where. */
static void vf_nbd_aim(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd, uint64_t left)
{
	const struct vf_nbd_export *export = &nbd->link.export;
	const struct vf_req *req = cmd->req;
	uint64_t len = left < export->block_max_bytes ? left : export->block_max_bytes;
	uint64_t segment = req->iov->iov_len < len ? req->iov->iov_len : len;

	segment -= segment & (export->block_min_bytes - 1u);
	if (vf_likely(segment == len || segment >= VF_NBD_DIRECT_MIN_BYTES)) {
		cmd->data = req->iov->iov_base;
		cmd->len_bytes = cmd->part_bytes = (uint32_t)segment;
		return;
	}
	vf_nbd_take_bounce(nbd, cmd);
	cmd->len_bytes = cmd->part_bytes = (uint32_t)(len < VF_NBD_BOUNCE_BYTES ? len : VF_NBD_BOUNCE_BYTES);
	if (cmd->kind == VF_NBD_WRITE)
		vf_nbd_copy(cmd, 0);
}

static void vf_nbd_aim_range(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd, uint64_t left)
{
	const struct vf_nbd_export *export = &nbd->link.export;
	const struct vf_req *req = cmd->req;
	uint64_t max = VF_NBD_RANGE_MAX_BYTES;

	/* Cut at a multiple of every unit that a server may free at a time: it would keep a unit that is cut. */
	max -= req->offset_bytes & (max - 1u);
	if (req->op == VF_OP_WRITE_ZEROES && !export->can_zero) { /* it could, when the device was made: write them */
		max = VF_NBD_BOUNCE_BYTES < export->block_max_bytes ? VF_NBD_BOUNCE_BYTES : export->block_max_bytes;
		cmd->kind = VF_NBD_WRITE;
		cmd->data = vf_nbd_zeroes(nbd);
	} else if (req->op == VF_OP_WRITE_ZEROES) {
		cmd->kind = VF_NBD_ZERO;
		cmd->flags = req->unmap ? 0 : LIBNBD_CMD_FLAG_NO_HOLE;
	} else {
		cmd->kind = VF_NBD_TRIM;
	}
	cmd->len_bytes = cmd->part_bytes = (uint32_t)(left < max ? left : max);
}

/* Whether this store has nothing to do for a request. */
static int vf_nbd_is_void(const struct vf_nbd *nbd, const struct vf_nbd_cmd *cmd)
{
	const struct vf_nbd_export *export = &nbd->link.export;

	if (cmd->req->op == VF_OP_FLUSH || cmd->behind) /* without the flag the server caches nothing that a flush could write */
		return nbd->engine->store.cache == VF_CACHE_UNSAFE || !export->can_flush;
	return cmd->req->op == VF_OP_DISCARD && !export->can_trim;
}

uint8_t vf_nbd_fua(const struct vf_nbd *nbd)
{
	return nbd->engine->store.write_flags && nbd->link.export.can_fua ? LIBNBD_CMD_FLAG_FUA : 0;
}

/* Make the next command of a request. */
static void vf_nbd_prepare(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	const struct vf_req *req = cmd->req;
	uint64_t left = req->left_bytes;

	cmd->flags = 0;
	cmd->skip_bytes = 0;
	cmd->offset_bytes = req->offset_bytes;
	if (req->op == VF_OP_FLUSH || cmd->behind) {
		cmd->kind = VF_NBD_FLUSH;
		cmd->offset_bytes = 0;
		cmd->len_bytes = cmd->part_bytes = 0;
		return;
	}
	if (vf_unlikely(vf_nbd_emulates(nbd))) {
		left = vf_nbd_blocks_aim(nbd, cmd);
		if (!left)
			return;
	}
	if (req->op == VF_OP_READ || req->op == VF_OP_WRITE) {
		cmd->kind = req->op == VF_OP_READ ? VF_NBD_READ : VF_NBD_WRITE;
		vf_nbd_aim(nbd, cmd, left);
	} else {
		vf_nbd_aim_range(nbd, cmd, left);
	}
	if (req->op != VF_OP_READ)
		cmd->flags |= vf_nbd_fua(nbd);
}

void vf_nbd_send(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	cmd->sent = 1;
	if (nbd->config.timeout_ns)
		cmd->since_ns = vf_now_ns();
	vf_nbd_link_send(nbd, cmd);
}

void vf_nbd_start(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	if (vf_unlikely(vf_nbd_is_void(nbd, cmd))) {
		vf_nbd_finish(nbd, cmd, 0);
		return;
	}
	if (vf_unlikely(cmd->req->offset_bytes + cmd->req->left_bytes > nbd->link.export.size_bytes)) {
		nbd->link.outgrown = 1; /* the next connection knows of it */
		return;
	}
	if (vf_unlikely(vf_nbd_emulates(nbd))) {
		enum vf_nbd_turn turn = vf_nbd_blocks_enter(nbd, cmd);

		if (turn == VF_NBD_NOTHING)
			vf_nbd_finish(nbd, cmd, 0);
		if (turn != VF_NBD_GO)
			return;
	}
	vf_nbd_prepare(nbd, cmd);
	vf_nbd_send(nbd, cmd);
}

void vf_nbd_answer(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd, int err)
{
	uint32_t at;

	if (vf_unlikely(err == ESHUTDOWN)) {
		nbd->link.leaving = 1; /* the next one may carry it out */
		return;
	}
	cmd->err = err;
	at = nbd->answered_head + nbd->answered_count++; /* there is room: a command is queued at most once */
	nbd->answered[at >= nbd->slot_count ? at - nbd->slot_count : at] = (uint16_t)(cmd - nbd->cmds);
}

/* Note the success of a command in its request, and continue with that. */
static void vf_nbd_advance(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	struct vf_req *req = cmd->req;

	if (vf_unlikely(cmd->is_fetch)) {
		vf_nbd_blocks_put(nbd, cmd);
		return;
	}
	if (cmd->kind == VF_NBD_READ && cmd->bounce)
		vf_nbd_copy(cmd, 1);
	vf_nbd_release(nbd, cmd);
	cmd->losses = 0;
	if (req->op == VF_OP_READ || req->op == VF_OP_WRITE) {
		vf_req_advance(req, cmd->part_bytes);
	} else if (!cmd->behind) {
		req->offset_bytes += cmd->part_bytes;
		req->left_bytes -= cmd->part_bytes;
	}
	if (req->left_bytes == 0) {
		if (cmd->behind || req->op == VF_OP_READ || req->op == VF_OP_FLUSH || !nbd->engine->store.write_flags ||
		    nbd->link.export.can_fua) {
			vf_nbd_finish(nbd, cmd, 0);
			return;
		}
		cmd->behind = 1;
	}
	cmd->sent = 0;
	vf_nbd_start(nbd, cmd);
}

/* Handle an error reply. A refused trim loses nothing, and zeroes can be written. */
static void vf_nbd_fail(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	int is_refusal = cmd->err == EOPNOTSUPP || cmd->err == EINVAL || cmd->err == EPERM;

	if (cmd->kind == VF_NBD_ZERO && is_refusal) {
		nbd->link.export.can_zero = 0; /* on this connection */
		vf_nbd_unsend(nbd, cmd);
		vf_nbd_start(nbd, cmd);
	} else {
		vf_nbd_finish(nbd, cmd, cmd->kind == VF_NBD_TRIM && (is_refusal || cmd->err == ENOSPC) ? 0 : -cmd->err);
	}
}

void vf_nbd_digest(struct vf_nbd *nbd)
{
	if (nbd->answered_count && !nbd->link.has_served) {
		nbd->link.has_served = 1;
		nbd->link.pause_ns = VF_NBD_PAUSE_MIN_NS;
	}
	/* Under TLS, starting commands may bring replies, too; those beyond so many wait for the next call. */
	for (uint32_t i = 0; i < 2u * nbd->slot_count && nbd->answered_count; i++) {
		struct vf_nbd_cmd *cmd = &nbd->cmds[nbd->answered[nbd->answered_head]];

		nbd->answered_head = nbd->answered_head + 1u < nbd->slot_count ? nbd->answered_head + 1u : 0;
		nbd->answered_count--;
		if (vf_likely(cmd->err == 0))
			vf_nbd_advance(nbd, cmd);
		else
			vf_nbd_fail(nbd, cmd);
	}
	if (vf_unlikely(nbd->is_due))
		vf_nbd_blocks_run(nbd);
}

/* Find out whether a previous worker may have sent a request already. */
static void vf_nbd_suspect(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	uint8_t op = cmd->req->op;

	nbd->link.has_new |= !nbd->engine->replaying;
	if (!nbd->engine->replaying || (op != VF_OP_WRITE && op != VF_OP_DISCARD && op != VF_OP_WRITE_ZEROES))
		return;
	cmd->is_old = nbd->link.state == VF_NBD_ENDING;
	if (nbd->link.doubt)
		vf_nbd_withhold(nbd, cmd, VF_NBD_WITHHELD);
}

static int vf_nbd_submit(struct vf_engine *engine, struct vf_req *req)
{
	struct vf_nbd *nbd = engine->state;
	struct vf_nbd_cmd *cmd = &nbd->cmds[req->slot];

	if (vf_unlikely(nbd->link.gave_up)) {
		req->result = -ENOTCONN;
		return 1;
	}
	cmd->req = req;
	cmd->losses = 0;
	cmd->behind = 0;
	cmd->sent = 0;
	engine->inflight_count++;
	if (vf_unlikely(engine->replaying || nbd->link.doubt))
		vf_nbd_suspect(nbd, cmd);
	if (vf_likely(nbd->link.state == VF_NBD_UP && cmd->fate == VF_NBD_FREE))
		vf_nbd_start(nbd, cmd);
	return 0;
}

/* No system call if replies are there already. */
static uint32_t vf_nbd_reap(struct vf_engine *engine, struct vf_req **done, uint32_t max)
{
	struct vf_nbd *nbd = engine->state;
	uint32_t count;

	vf_nbd_link_pump(nbd);
	if (vf_unlikely(nbd->events.count))
		engine->readable |= VF_READABLE_EVENTS;
	for (count = 0; count < max && nbd->done_count; count++) {
		done[count] = nbd->done[nbd->done_head];
		nbd->done_head = nbd->done_head + 1u < nbd->slot_count ? nbd->done_head + 1u : 0;
		nbd->done_count--;
	}
	engine->inflight_count -= count;
	return count;
}

/* Check for replies; without any, wait for the connection, count other descriptors, or the time. 1: the time is up. */
static int vf_nbd_sleep(struct vf_engine *engine, const int *fds, uint32_t count, int timeout_ms)
{
	struct vf_nbd *nbd = engine->state;
	struct pollfd polled[VF_WATCH_MAX + 1u];
	uint64_t until_ns, now_ns;
	int limit_ms = timeout_ms;
	int ready;

	vf_nbd_link_pump(nbd);
	if (nbd->done_count == 0 && nbd->events.count == 0) {
		for (uint32_t i = 0; i < count; i++)
			polled[i] = (struct pollfd){ .fd = fds[i], .events = POLLIN };
		polled[count] = (struct pollfd){ .fd = -1 };
		polled[count].fd = vf_nbd_link_wants(nbd, &polled[count].events, &until_ns);
		if (until_ns != UINT64_MAX) {
			now_ns = vf_now_ns();
			if (until_ns <= now_ns)
				limit_ms = 0;
			else if ((until_ns - now_ns) / 1000000u < (uint64_t)limit_ms)
				limit_ms = (int)((until_ns - now_ns) / 1000000u) + 1;
		}
		ready = poll(polled, count + 1u, limit_ms);
		if (ready == 0 && limit_ms == timeout_ms)
			return 1;
		for (uint32_t i = 0; ready > 0 && i < count; i++)
			engine->readable |= (uint32_t)(polled[i].revents != 0) << i;
		/* With nothing in flight nobody reaps. */
		if (ready <= 0 || polled[count].revents)
			vf_nbd_link_pump(nbd);
	}
	if (nbd->events.count)
		engine->readable |= VF_READABLE_EVENTS;
	return 0;
}

static void vf_nbd_wait(struct vf_engine *engine)
{
	if (engine->inflight_count)
		vf_nbd_sleep(engine, NULL, 0, VF_NBD_WAIT_MS);
}

static void vf_nbd_flush(struct vf_engine *engine)
{
	struct vf_nbd *nbd = engine->state;

	if (nbd->wire.count)
		vf_nbd_wire_flush(nbd);
}

static void vf_nbd_free(struct vf_nbd *nbd)
{
	if (nbd->bounce)
		munmap(nbd->bounce, ((size_t)nbd->slot_count + 1u) * VF_NBD_BOUNCE_BYTES);
	free(nbd->bounce_free);
	free(nbd->done);
	free(nbd->answered);
	free(nbd->cmds);
	vf_nbd_wire_close(nbd);
	nbd->bounce = NULL;
	nbd->bounce_free = NULL;
	nbd->done = NULL;
	nbd->answered = NULL;
	nbd->cmds = NULL;
}

static int vf_nbd_open(struct vf_engine *engine, uint32_t slot_count)
{
	struct vf_nbd *nbd = engine->context;
	void *bounce;

	nbd->slot_count = slot_count;
	nbd->answered_head = nbd->answered_count = nbd->done_head = nbd->done_count = 0;
	nbd->cmds = calloc(slot_count, sizeof(*nbd->cmds));
	nbd->answered = calloc(slot_count, sizeof(*nbd->answered));
	nbd->done = calloc(slot_count, sizeof(struct vf_req *));
	nbd->bounce_free = calloc(slot_count, sizeof(*nbd->bounce_free));
	/* Address space: pages come as they are used, the same ones again and again. */
	bounce = mmap(NULL, ((size_t)slot_count + 1u) * VF_NBD_BOUNCE_BYTES, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (bounce != MAP_FAILED) {
		vf_core_exclude(bounce, ((size_t)slot_count + 1u) * VF_NBD_BOUNCE_BYTES);
		nbd->bounce = bounce;
	}
	if (vf_nbd_wire_open(nbd) || !nbd->cmds || !nbd->answered || !nbd->done || !nbd->bounce_free || !nbd->bounce) {
		vf_nbd_free(nbd);
		return -ENOMEM;
	}
	for (uint32_t i = 0; i < slot_count; i++) {
		nbd->cmds[i].nbd = nbd;
		nbd->bounce_free[i] = (uint16_t)(slot_count - 1u - i);
	}
	nbd->bounce_free_count = slot_count;
	nbd->engine = engine;
	engine->state = nbd;
	engine->marks_replays = 1;
	engine->always = 1; /* a connection can die while there is nothing to do */
	vf_nbd_link_open(nbd);
	return 0;
}

static void vf_nbd_close(struct vf_engine *engine)
{
	struct vf_nbd *nbd = engine->state;

	vf_nbd_link_close(nbd); /* before the buffers, so that nothing is received into them */
	vf_nbd_free(nbd);
	nbd->engine = NULL;
	engine->state = NULL;
}

static const struct vf_engine_ops vf_engine_nbd = {
	.name = "nbd",
	.open = vf_nbd_open,
	.submit = vf_nbd_submit,
	.flush = vf_nbd_flush,
	.reap = vf_nbd_reap,
	.wait = vf_nbd_wait,
	.sleep = vf_nbd_sleep,
	.close = vf_nbd_close,
	.publish_batch = 64,
};

struct vf_nbd *vf_nbd_create(const struct vf_nbd_config *config)
{
	struct vf_nbd *nbd;
	int err;

	if (strlen(config->uri) >= VF_NBD_URI_BYTES) {
		errno = ENAMETOOLONG;
		return NULL;
	}
	nbd = calloc(1, sizeof(*nbd));
	if (!nbd)
		return NULL;
	nbd->config = *config;
	snprintf(nbd->uri, sizeof(nbd->uri), "%s", config->uri);
	nbd->config.uri = nbd->uri;
	nbd->known_size_bytes = config->size_bytes;
	nbd->plugin = (struct vf_engine_plugin)VF_ENGINE_PLUGIN(&vf_engine_nbd, nbd);
	err = vf_nbd_events_open(&nbd->events);
	if (err) {
		free(nbd);
		errno = -err;
		return NULL;
	}
	return nbd;
}

void vf_nbd_destroy(struct vf_nbd *nbd)
{
	if (!nbd)
		return;
	vf_nbd_events_close(&nbd->events);
	free(nbd);
}

const struct vf_engine_plugin *vf_nbd_plugin(const struct vf_nbd *nbd)
{
	return &nbd->plugin;
}

struct vf_nbd_event_ring *vf_nbd_events_of(struct vf_nbd *nbd)
{
	return &nbd->events;
}
