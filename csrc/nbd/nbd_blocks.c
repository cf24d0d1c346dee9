/* SPDX-License-Identifier: Apache-2.0
 *
 * An export whose smallest block is larger than the device's. To write a part of a block, fetch the block, change it and write it
 * back. To read a part, read more and copy it out.
 *
 * Writing back includes bytes that the request does not mention, so nothing else may change the block meanwhile. So the process
 * has the export to itself (`sole`: the only worker, or the relay of all). A request that changes a part of a block waits for
 * all earlier ones that touch its blocks, and later ones that touch them wait for it. Whole blocks do not wait for each other.
 * Reads never wait, because the bytes written back are unchanged.
 *
 * A dying connection does no harm: the fence (nbd_fence.c) waits until the server has finished its commands before anything is
 * sent again, and then the block is fetched again. The server writes a whole block or none of it.
 */
#include "nbd/internal.h"

#include <errno.h>
#include <string.h>

#include "base/barrier.h"

int vf_nbd_emulates(const struct vf_nbd *nbd)
{
	return nbd->link.export.block_min_bytes > nbd->config.block_size_bytes;
}

static uint64_t vf_nbd_within(const struct vf_nbd *nbd, uint64_t bytes)
{
	return bytes & (nbd->link.export.block_min_bytes - 1u);
}

static int vf_nbd_is_partial(const struct vf_nbd *nbd, const struct vf_req *req)
{
	/* Reduce a discard to whole blocks. */
	return req->op != VF_OP_DISCARD &&
	       (vf_nbd_within(nbd, req->offset_bytes) || vf_nbd_within(nbd, req->offset_bytes + req->left_bytes));
}

/* Whether two requests may not be with the server at once. */
static int vf_nbd_collide(const struct vf_nbd *nbd, const struct vf_req *a, const struct vf_req *b)
{
	uint64_t unit = nbd->link.export.block_min_bytes;
	uint64_t a_end = a->offset_bytes + a->left_bytes, b_end = b->offset_bytes + b->left_bytes;

	if (a->offset_bytes / unit > (b_end - 1u) / unit || b->offset_bytes / unit > (a_end - 1u) / unit)
		return 0;
	return vf_nbd_is_partial(nbd, a) || vf_nbd_is_partial(nbd, b);
}

static int vf_nbd_must_wait(const struct vf_nbd *nbd, const struct vf_nbd_cmd *cmd)
{
	for (const struct vf_nbd_cmd *other = cmd->earlier; other; other = other->earlier) {
		if (other->req->left_bytes && vf_nbd_collide(nbd, other->req, cmd->req))
			return 1;
	}
	return 0;
}

static void vf_nbd_enlist(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	cmd->listed = 1;
	cmd->later = NULL;
	cmd->earlier = nbd->last;
	if (nbd->last)
		nbd->last->later = cmd;
	else
		nbd->first = cmd;
	nbd->last = cmd;
}

void vf_nbd_blocks_leave(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	if (!cmd->listed)
		return;
	if (cmd->earlier)
		cmd->earlier->later = cmd->later;
	else
		nbd->first = cmd->later;
	if (cmd->later)
		cmd->later->earlier = cmd->earlier;
	else
		nbd->last = cmd->earlier;
	cmd->listed = 0;
	cmd->waits = 0;
	nbd->is_due = 1;
}

/* A discard without a whole block does nothing. */
static void vf_nbd_trim_discard(const struct vf_nbd *nbd, struct vf_req *req)
{
	uint64_t unit = nbd->link.export.block_min_bytes;
	uint64_t end = req->offset_bytes + req->left_bytes;
	uint64_t start = req->offset_bytes + unit - 1u;

	start -= vf_nbd_within(nbd, start);
	end -= vf_nbd_within(nbd, end);
	req->left_bytes = end > start ? end - start : 0;
	req->offset_bytes = start;
}

enum vf_nbd_turn vf_nbd_blocks_enter(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	struct vf_req *req = cmd->req;

	if (cmd->behind || (req->op != VF_OP_WRITE && req->op != VF_OP_WRITE_ZEROES && req->op != VF_OP_DISCARD))
		return VF_NBD_GO;
	if (req->op == VF_OP_DISCARD) {
		vf_nbd_trim_discard(nbd, req);
		if (!req->left_bytes)
			return VF_NBD_NOTHING;
	}
	if (!cmd->listed)
		vf_nbd_enlist(nbd, cmd);
	cmd->waits = (uint8_t)vf_nbd_must_wait(nbd, cmd);
	return cmd->waits ? VF_NBD_WAIT : VF_NBD_GO;
}

void vf_nbd_blocks_reset(struct vf_nbd *nbd)
{
	nbd->first = nbd->last = NULL;
	nbd->is_due = 0;
	for (uint32_t i = 0; i < nbd->slot_count; i++)
		nbd->cmds[i].listed = nbd->cmds[i].waits = 0;
}

void vf_nbd_blocks_run(struct vf_nbd *nbd)
{
	struct vf_nbd_cmd *cmd, *later;

	nbd->is_due = 0;
	for (cmd = nbd->first; cmd && nbd->link.state == VF_NBD_UP; cmd = later) {
		later = cmd->later; /* this one may be finished at once, those after it are not */
		if (cmd->waits && !vf_nbd_must_wait(nbd, cmd))
			vf_nbd_start(nbd, cmd);
	}
}

uint64_t vf_nbd_blocks_aim(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	uint64_t unit = nbd->link.export.block_min_bytes;
	const struct vf_req *req = cmd->req;
	uint64_t skip = vf_nbd_within(nbd, req->offset_bytes);
	uint64_t span, part;

	if (!skip && req->left_bytes >= unit)
		return req->left_bytes - vf_nbd_within(nbd, req->left_bytes);
	if (req->op == VF_OP_READ) {
		span = skip + req->left_bytes + unit - 1u;
		span -= vf_nbd_within(nbd, span);
		if (span > VF_NBD_BOUNCE_BYTES)
			span = VF_NBD_BOUNCE_BYTES;
		if (span > nbd->link.export.block_max_bytes)
			span = nbd->link.export.block_max_bytes;
	} else {
		span = unit;
		cmd->is_fetch = 1;
	}
	part = span - skip;
	vf_nbd_take_bounce(nbd, cmd);
	cmd->kind = VF_NBD_READ;
	cmd->offset_bytes = req->offset_bytes - skip;
	cmd->len_bytes = (uint32_t)span;
	cmd->skip_bytes = (uint32_t)skip;
	cmd->part_bytes = (uint32_t)(part < req->left_bytes ? part : req->left_bytes);
	return 0;
}

void vf_nbd_blocks_put(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	cmd->is_fetch = 0;
	cmd->kind = VF_NBD_WRITE;
	cmd->data = cmd->bounce;
	if (cmd->req->op == VF_OP_WRITE)
		vf_nbd_copy(cmd, 0);
	else
		memset(cmd->bounce + cmd->skip_bytes, 0, cmd->part_bytes);
	cmd->flags = vf_nbd_fua(nbd);
	vf_nbd_send(nbd, cmd);
}
