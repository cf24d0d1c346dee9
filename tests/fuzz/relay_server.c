/* SPDX-License-Identifier: Apache-2.0
 *
 * A relay over a store in memory, under the sanitizers: relay_server END_FD SLOTS LISTEN_FD:MEMORY_FD... Requests are
 * finished at once or later, in any order. It ends with status 0 once END_FD is readable.
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "relay/relay.h"

#define STORE_BYTES (1u << 20)
#define PENDING_MAX 65536u

static uint8_t bytes[STORE_BYTES];
static struct vf_req *pending[PENDING_MAX];

static void carry_out(struct vf_req *req)
{
	uint8_t *at = bytes + req->offset_bytes;

	req->result = 0;
	if (req->op == VF_OP_FLUSH)
		return;
	if (req->offset_bytes > STORE_BYTES || req->left_bytes > STORE_BYTES - req->offset_bytes)
		req->result = -EINVAL;
	else if (req->op == VF_OP_READ)
		memcpy(req->iov->iov_base, at, req->left_bytes);
	else if (req->op == VF_OP_WRITE)
		memcpy(at, req->iov->iov_base, req->left_bytes);
	else
		memset(at, 0, req->left_bytes);
}

static int later_submit(struct vf_engine *engine, struct vf_req *req)
{
	if (random() % 2) {
		carry_out(req);
		return 1;
	}
	pending[engine->inflight_count++] = req;
	return 0;
}

static uint32_t later_reap(struct vf_engine *engine, struct vf_req **done, uint32_t max)
{
	uint32_t count = 0;

	while (count < max && engine->inflight_count && random() % 4) {
		uint32_t chosen = (uint32_t)random() % engine->inflight_count;

		done[count] = pending[chosen];
		pending[chosen] = pending[--engine->inflight_count];
		carry_out(done[count++]);
	}
	return count;
}

static int later_sleep(struct vf_engine *engine, const int *fds, uint32_t count, int timeout_ms)
{
	struct pollfd polled[VF_WATCH_MAX];

	for (uint32_t i = 0; i < count; i++)
		polled[i] = (struct pollfd){ .fd = fds[i], .events = POLLIN };
	poll(polled, count, engine->inflight_count ? 0 : timeout_ms);
	for (uint32_t i = 0; i < count; i++)
		engine->readable |= (uint32_t)(polled[i].revents != 0) << i;
	return 0;
}

static const struct vf_engine_ops ops = {
	.name = "later",
	.submit = later_submit,
	.reap = later_reap,
	.sleep = later_sleep,
};

int main(int argc, char **argv)
{
	struct vf_engine_plugin plugin = VF_ENGINE_PLUGIN(&ops, NULL);
	struct vf_store store = { .fd = -1, .kind = VF_STORE_PLUGIN, .size_bytes = STORE_BYTES };
	struct vf_relay_place place[VF_RELAY_QUEUE_MAX];
	struct vf_relay_server *server;

	for (int i = 3; i < argc; i++) {
		if (sscanf(argv[i], "%d:%d", &place[i - 3].listen_fd, &place[i - 3].memory_fd) != 2)
			return 2;
	}
	server = vf_relay_open(&plugin, &store, place, (uint32_t)argc - 3u, (uint32_t)atoi(argv[2]), 0);
	if (!server) {
		perror("vf_relay_open");
		return 2;
	}
	while (vf_relay_serve(server, atoi(argv[1])) != VF_RELAY_WOKEN)
		;
	vf_relay_close(server);
	return 0;
}
