/* SPDX-License-Identifier: Apache-2.0
 *
 * The worker's side of a relay, as an engine.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/barrier.h"
#include "base/clock.h"
#include "base/core_dump.h"
#include "relay/relay.h"

#define VF_RETRY_NS 20000000u /* between two tries to reach a relay */
#define VF_RETRY_MS 20
#define VF_ERRNO_MAX 4095

enum vf_client_state {
	VF_CLIENT_AWAY, /* no relay */
	VF_CLIENT_GREETED, /* it has our hello */
	VF_CLIENT_READY,
};

enum vf_client_place {
	VF_CLIENT_KEPT, /* to be sent, perhaps again to the next relay */
	VF_CLIENT_BATCHED,
	VF_CLIENT_ASKED, /* this relay has it: one answer belongs to it */
};

struct vf_client_slot {
	struct vf_req *req; /* NULL: none is in flight */
	uint8_t place; /* enum vf_client_place */
	uint8_t replays; /* an earlier relay may have had it */
};

struct vf_client {
	enum vf_client_state state;
	int fd; /* -1: away */
	uint8_t *memory;
	uint32_t slot_count;
	uint64_t retry_ns; /* when to try again */
	uint8_t behind; /* there are requests that have not been sent */
	uint32_t batch_count;
	struct vf_relay_request batch[VF_RELAY_BATCH_MAX];
	struct vf_client_slot slot[];
};

static size_t vf_client_memory_bytes(const struct vf_client *client)
{
	return (size_t)client->slot_count * VF_RELAY_CHUNK_BYTES;
}

static uint8_t *vf_client_chunk(const struct vf_client *client, const struct vf_req *req)
{
	return client->memory + (size_t)req->slot * VF_RELAY_CHUNK_BYTES;
}

/* The size of a request's next piece. Requests without data are one piece. */
static uint64_t vf_client_piece(const struct vf_req *req)
{
	int has_data = req->op == VF_OP_READ || req->op == VF_OP_WRITE;

	return has_data && req->left_bytes > VF_RELAY_CHUNK_BYTES ? VF_RELAY_CHUNK_BYTES : req->left_bytes;
}

/* Copy between the chunk and the driver's memory at the request's cursor, which stays. */
static void vf_client_copy(struct vf_client *client, struct vf_req *req, uint64_t len, int to_driver)
{
	uint8_t *chunk = vf_client_chunk(client, req);

	for (uint32_t i = 0; len; i++) {
		size_t n = req->iov[i].iov_len < len ? req->iov[i].iov_len : (size_t)len;

		if (to_driver)
			vf_copy_to_shared(req->iov[i].iov_base, chunk, n);
		else
			vf_copy_from_shared(chunk, req->iov[i].iov_base, n);
		chunk += n;
		len -= n;
	}
}

/* The relay has ended: its requests are sent again to the next one. */
static void vf_client_leave(struct vf_client *client)
{
	if (client->fd >= 0)
		close(client->fd);
	client->fd = -1;
	client->state = VF_CLIENT_AWAY;
	client->batch_count = 0;
	client->behind = 1;
	for (uint32_t i = 0; i < client->slot_count; i++) {
		client->slot[i].replays |= client->slot[i].place == VF_CLIENT_ASKED;
		client->slot[i].place = VF_CLIENT_KEPT;
	}
	client->retry_ns = vf_now_ns() + VF_RETRY_NS;
}

static void vf_client_send_batch(struct vf_client *client)
{
	size_t len = client->batch_count * sizeof(client->batch[0]);

	if (client->state != VF_CLIENT_READY || client->batch_count == 0)
		return;
	if (send(client->fd, client->batch, len, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)len) {
		if (errno != EAGAIN && errno != EINTR) /* a busy relay receives it later */
			vf_client_leave(client);
		return;
	}
	for (uint32_t i = 0; i < client->batch_count; i++)
		client->slot[client->batch[i].slot].place = VF_CLIENT_ASKED;
	client->batch_count = 0;
}

static void vf_client_queue(struct vf_engine *engine, struct vf_req *req)
{
	struct vf_client *client = engine->state;
	uint64_t len = vf_client_piece(req);

	if (client->batch_count == VF_RELAY_BATCH_MAX)
		vf_client_send_batch(client);
	if (client->state != VF_CLIENT_READY || client->batch_count == VF_RELAY_BATCH_MAX) {
		client->slot[req->slot].place = VF_CLIENT_KEPT;
		client->behind = 1;
		return;
	}
	if (req->op == VF_OP_WRITE)
		vf_client_copy(client, req, len, 0);
	client->slot[req->slot].place = VF_CLIENT_BATCHED;
	client->batch[client->batch_count++] = (struct vf_relay_request){
		.offset_bytes = req->offset_bytes,
		.len_bytes = len,
		.slot = req->slot,
		.op = req->op,
		.flags = (uint8_t)((req->unmap ? VF_RELAY_F_UNMAP : 0) |
				   (client->slot[req->slot].replays ? VF_RELAY_F_REPLAY : 0) |
				   (engine->store.write_flags ? VF_RELAY_F_DURABLE : 0)),
	};
}

/* Send new requests, and those that could not be sent before. */
static void vf_client_send(struct vf_engine *engine)
{
	struct vf_client *client = engine->state;

	vf_client_send_batch(client);
	if (vf_likely(!client->behind) || client->state != VF_CLIENT_READY || client->batch_count)
		return;
	client->behind = 0;
	for (uint32_t i = 0; i < client->slot_count; i++) {
		if (client->slot[i].req && client->slot[i].place == VF_CLIENT_KEPT)
			vf_client_queue(engine, client->slot[i].req);
	}
	vf_client_send_batch(client);
}

static int vf_client_greet(const struct vf_engine *engine, int fd)
{
	const struct vf_client *client = engine->state;
	const struct vf_relay_address *address = engine->context;
	struct vf_relay_hello hello = {
		.magic = VF_RELAY_MAGIC,
		.queue = address->queue,
		.slot_count = client->slot_count,
	};

	return send(fd, &hello, sizeof(hello), MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)sizeof(hello) ? 0 : -errno;
}

/* Try to connect to a relay, at most every 20 ms. Without a relay that fails at once. */
static void vf_client_reach(struct vf_engine *engine)
{
	struct vf_client *client = engine->state;
	const struct vf_relay_address *to = engine->context;
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	uint64_t now_ns = vf_now_ns();
	int fd;

	if (now_ns < client->retry_ns)
		return;
	client->retry_ns = now_ns + VF_RETRY_NS;
	memcpy(address.sun_path, to->path, sizeof(address.sun_path));
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); /* a stopped relay accepts nobody */
	if (fd < 0)
		return; /* tried again, as after any other error */
	if (connect(fd, (const struct sockaddr *)&address, sizeof(address)) || vf_client_greet(engine, fd)) {
		close(fd);
		return;
	}
	client->fd = fd;
	client->state = VF_CLIENT_GREETED;
}

/* Whether the request is finished. */
static int vf_client_take(struct vf_engine *engine, const struct vf_relay_answer *answer, struct vf_req *req)
{
	struct vf_client *client = engine->state;
	uint64_t len = vf_client_piece(req);

	req->result = answer->result > 0 || answer->result < -VF_ERRNO_MAX ? -EIO : answer->result;
	if (answer->result == 0 && (req->op == VF_OP_READ || req->op == VF_OP_WRITE)) {
		if (req->op == VF_OP_READ)
			vf_client_copy(client, req, len, 1);
		vf_req_advance(req, len);
		if (req->left_bytes) {
			vf_client_queue(engine, req);
			return 0;
		}
	}
	client->slot[req->slot].req = NULL;
	engine->inflight_count--;
	return 1;
}

/* Receive one packet. The number of requests that it finishes, -1: there is none. */
static int vf_client_hear(struct vf_engine *engine, struct vf_req **done)
{
	struct vf_client *client = engine->state;
	struct vf_relay_answer answer[VF_RELAY_BATCH_MAX];
	struct vf_relay_ready ready;
	ssize_t len = recv(client->fd, answer, sizeof(answer), MSG_DONTWAIT | MSG_TRUNC);
	int count = 0;

	if (len <= 0) {
		if (len == 0 || (errno != EAGAIN && errno != EINTR))
			vf_client_leave(client);
		return -1;
	}
	if (client->state == VF_CLIENT_GREETED) {
		memcpy(&ready, answer, sizeof(ready));
		if (len != (ssize_t)sizeof(ready) || ready.magic != VF_RELAY_MAGIC)
			vf_client_leave(client);
		else
			client->state = VF_CLIENT_READY; /* what is in flight goes with the next vf_client_send() */
		return 0;
	}
	if ((size_t)len > sizeof(answer) || (size_t)len % sizeof(answer[0])) {
		vf_client_leave(client);
		return -1;
	}
	for (uint32_t i = 0; i < (size_t)len / sizeof(answer[0]); i++) {
		struct vf_client_slot *slot = answer[i].slot < client->slot_count ? &client->slot[answer[i].slot] : NULL;
		struct vf_req *req = slot ? slot->req : NULL;

		if (!req || slot->place != VF_CLIENT_ASKED) { /* an answer to no request, or a second one */
			vf_client_leave(client);
			return count;
		}
		slot->place = VF_CLIENT_KEPT;
		if (vf_client_take(engine, &answer[i], req))
			done[count++] = req;
	}
	return count;
}

static int vf_client_open(struct vf_engine *engine, uint32_t slot_count)
{
	const struct vf_relay_address *address = engine->context;
	struct vf_client *client = calloc(1, sizeof(*client) + slot_count * sizeof(client->slot[0]));
	struct stat status;
	size_t len;
	int err;

	if (!client)
		return -ENOMEM;
	client->fd = -1;
	client->slot_count = slot_count;
	len = vf_client_memory_bytes(client);
	err = fstat(address->memory_fd, &status) ? -errno : 0;
	if (!err && (uint64_t)status.st_size < len)
		err = -EINVAL;
	/* Pages of it exist only once they are used. */
	client->memory = err ? MAP_FAILED : mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, address->memory_fd, 0);
	if (client->memory == MAP_FAILED) {
		err = err ? err : -errno;
		free(client);
		return err;
	}
	vf_core_exclude(client->memory, len);
	engine->state = client;
	engine->marks_replays = 1;
	vf_client_reach(engine);
	return 0;
}

static int vf_client_submit(struct vf_engine *engine, struct vf_req *req)
{
	struct vf_client *client = engine->state;

	if (req->op == VF_OP_FLUSH && engine->store.cache == VF_CACHE_UNSAFE) {
		req->result = 0;
		return 1;
	}
	client->slot[req->slot].req = req;
	client->slot[req->slot].replays = engine->replaying;
	engine->inflight_count++;
	vf_client_queue(engine, req);
	return 0;
}

static void vf_client_flush(struct vf_engine *engine)
{
	vf_client_send(engine);
}

static uint32_t vf_client_reap(struct vf_engine *engine, struct vf_req **done, uint32_t max)
{
	struct vf_client *client = engine->state;
	uint32_t count = 0;
	int finished = 0;

	if (client->state == VF_CLIENT_AWAY)
		vf_client_reach(engine);
	while (finished >= 0 && client->fd >= 0 && max - count >= VF_RELAY_BATCH_MAX) {
		finished = vf_client_hear(engine, done + count);
		if (finished > 0)
			count += (uint32_t)finished;
	}
	vf_client_send(engine);
	return count;
}

static int vf_client_poll(struct vf_engine *engine, const int *fds, uint32_t count, int timeout_ms)
{
	struct vf_client *client = engine->state;
	struct pollfd polled[VF_WATCH_MAX + 1u];
	int soon = client->fd < 0 || client->behind || client->batch_count;
	int limit_ms = soon && timeout_ms > VF_RETRY_MS ? VF_RETRY_MS : timeout_ms;
	int ready;

	for (uint32_t i = 0; i < count; i++)
		polled[i] = (struct pollfd){ .fd = fds[i], .events = POLLIN };
	polled[count] = (struct pollfd){ .fd = client->fd, .events = POLLIN }; /* poll() skips -1 */
	ready = poll(polled, count + 1u, limit_ms);
	for (uint32_t i = 0; ready > 0 && i < count; i++)
		engine->readable |= (uint32_t)(polled[i].revents != 0) << i;
	return ready == 0 && limit_ms == timeout_ms;
}

static int vf_client_sleep(struct vf_engine *engine, const int *fds, uint32_t count, int timeout_ms)
{
	vf_client_send(engine);
	return vf_client_poll(engine, fds, count, timeout_ms);
}

static void vf_client_wait(struct vf_engine *engine)
{
	vf_client_send(engine);
	vf_client_poll(engine, NULL, 0, 1000);
}

static void vf_client_close(struct vf_engine *engine)
{
	struct vf_client *client = engine->state;

	vf_client_leave(client);
	munmap(client->memory, vf_client_memory_bytes(client));
	free(client);
	engine->state = NULL;
}

const struct vf_engine_ops vf_engine_relay = {
	.name = "relay",
	.open = vf_client_open,
	.submit = vf_client_submit,
	.flush = vf_client_flush,
	.reap = vf_client_reap,
	.wait = vf_client_wait,
	.sleep = vf_client_sleep,
	.close = vf_client_close,
	.publish_batch = 16,
};
