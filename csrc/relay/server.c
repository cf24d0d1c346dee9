/* SPDX-License-Identifier: Apache-2.0
 *
 * The relay's side: packets of the workers' sockets into requests of the one engine, and back.
 *
 * A worker is not trusted. Its packets are copied once and checked before they are used. Its socket decides its queue, and the
 * supervisor chooses its memory. It has its own slots, answers and turn. A worker that breaks the rules is disconnected, and the
 * others are not affected.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/barrier.h"
#include "base/clock.h"
#include "base/core_dump.h"
#include "relay/relay.h"

#define VF_EVENT_MAX 16
#define VF_REAP_MAX 64u
#define VF_PACKET_MAX 16u /* of one worker, before it is another's turn */
#define VF_TICK_MS 100
#define VF_BEHIND_MS 5 /* a worker does not receive its answers: try again soon */
#define VF_COMPLAINT_NS 1000000000u /* between two lines about one queue's workers */

enum vf_slot_state {
	VF_SLOT_FREE,
	VF_SLOT_ASKED, /* the engine has it */
	VF_SLOT_ANSWERED, /* and its answer is not sent */
};

/* One queue: the worker that is served, and the next one, if it has connected. */
struct vf_seat {
	int listen_fd; /* borrowed */
	int fd; /* -1: no worker is served; requests of the previous one may still be in flight */
	int next_fd; /* waits, unread, until the previous worker's requests have ended; -1: none */
	uint8_t welcome; /* it has said hello */
	uint8_t durable; /* its writes must be durable when they are completed */
	uint8_t *memory;
	uint8_t *slot_state; /* enum vf_slot_state, of slot_count slots */
	struct vf_relay_answer *answer; /* slot_count: each slot has one at most */
	uint32_t asked_count;
	uint32_t answer_count;
	uint64_t complained_ns;
};

struct vf_relay_server {
	struct vf_engine engine;
	int epoll_fd;
	uint32_t queue_count;
	uint32_t slot_count; /* of a queue */
	uint8_t read_only;
	uint8_t behind; /* there are answers that could not be sent */
	struct vf_req *req; /* slot_count of each queue */
	struct iovec *iov; /* one for each */
	struct vf_seat seat[VF_RELAY_QUEUE_MAX];
};

static size_t vf_server_memory_bytes(const struct vf_relay_server *server)
{
	return (size_t)server->slot_count * VF_RELAY_CHUNK_BYTES;
}

static int vf_server_watch(const struct vf_relay_server *server, const struct vf_seat *seat, int fd)
{
	uint32_t place = 2u * (uint32_t)(seat - server->seat) + (fd != seat->listen_fd);
	struct epoll_event event = { .events = EPOLLIN, .data = { .u32 = place } };

	return epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

/* The engine looks whenever it likes: nobody may undo what somebody else relies on. */
static void vf_seat_want_durable(struct vf_relay_server *server, struct vf_seat *seat, uint8_t durable)
{
	if (seat->durable == durable)
		return;
	seat->durable = durable;
	server->engine.store.write_flags = 0;
	for (uint32_t i = 0; i < server->queue_count; i++)
		server->engine.store.write_flags |= server->seat[i].durable;
}

/* If no worker is left, and nothing is in flight, serve the next one. */
static void vf_seat_settle(struct vf_relay_server *server, struct vf_seat *seat)
{
	if (seat->fd >= 0 || seat->asked_count)
		return;
	vf_seat_want_durable(server, seat, 0);
	if (seat->next_fd < 0)
		return;
	seat->fd = seat->next_fd;
	seat->next_fd = -1;
	if (vf_server_watch(server, seat, seat->fd)) { /* it tries again */
		close(seat->fd);
		seat->fd = -1;
	}
}

static void vf_seat_leave(struct vf_relay_server *server, struct vf_seat *seat)
{
	if (seat->fd >= 0)
		close(seat->fd); /* and with it its place in the epoll set */
	seat->fd = -1;
	seat->welcome = 0;
	for (uint32_t i = 0; i < seat->answer_count; i++)
		seat->slot_state[seat->answer[i].slot] = VF_SLOT_FREE;
	seat->answer_count = 0;
	vf_seat_settle(server, seat);
}

/* Disconnect a worker that has broken the rules. */
static void vf_seat_expel(struct vf_relay_server *server, struct vf_seat *seat, const char *why)
{
	uint64_t now_ns = vf_now_ns();

	if (!seat->complained_ns || now_ns - seat->complained_ns > VF_COMPLAINT_NS) {
		seat->complained_ns = now_ns;
		fprintf(stderr, "queue %u: its worker is disconnected from the store: it sent %s\n",
			(unsigned)(seat - server->seat), why);
	}
	vf_seat_leave(server, seat);
}

static void vf_seat_send(struct vf_relay_server *server, struct vf_seat *seat)
{
	uint32_t sent = 0;

	while (sent < seat->answer_count) {
		uint32_t left = seat->answer_count - sent;
		uint32_t count = left < VF_RELAY_BATCH_MAX ? left : VF_RELAY_BATCH_MAX;
		size_t len = count * sizeof(seat->answer[0]);

		if (send(seat->fd, &seat->answer[sent], len, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)len) {
			if (errno != EAGAIN && errno != EINTR) {
				vf_seat_leave(server, seat);
				return;
			}
			server->behind = 1;
			break;
		}
		for (uint32_t i = sent; i < sent + count; i++)
			seat->slot_state[seat->answer[i].slot] = VF_SLOT_FREE;
		sent += count;
	}
	seat->answer_count -= sent;
	memmove(seat->answer, seat->answer + sent, seat->answer_count * sizeof(seat->answer[0]));
}

static void vf_server_send(struct vf_relay_server *server)
{
	server->behind = 0;
	for (uint32_t i = 0; i < server->queue_count; i++) {
		if (server->seat[i].answer_count)
			vf_seat_send(server, &server->seat[i]);
	}
}

static void vf_server_finish(struct vf_relay_server *server, struct vf_req *req)
{
	struct vf_seat *seat = &server->seat[req->slot / server->slot_count];
	uint32_t slot = req->slot % server->slot_count;

	seat->asked_count--;
	if (seat->fd >= 0) {
		seat->slot_state[slot] = VF_SLOT_ANSWERED;
		seat->answer[seat->answer_count++] = (struct vf_relay_answer){ .slot = slot, .result = req->result };
		return;
	}
	seat->slot_state[slot] = VF_SLOT_FREE;
	vf_seat_settle(server, seat);
}

static void vf_server_reap(struct vf_relay_server *server)
{
	struct vf_req *done[VF_REAP_MAX];
	uint32_t count;

	while (server->engine.inflight_count) {
		count = server->engine.ops->reap(&server->engine, done, VF_REAP_MAX);
		if (count == 0)
			return;
		for (uint32_t i = 0; i < count; i++)
			vf_server_finish(server, done[i]);
	}
}

static int vf_is_range(const struct vf_relay_request *asked)
{
	return asked->len_bytes && asked->len_bytes % VF_SECTOR_BYTES == 0 && asked->offset_bytes % VF_SECTOR_BYTES == 0 &&
	       asked->offset_bytes <= INT64_MAX && asked->len_bytes <= INT64_MAX - asked->offset_bytes;
}

/* Returns what is wrong with a request, NULL: nothing. */
static const char *vf_server_judge(const struct vf_relay_server *server, const struct vf_seat *seat,
				   const struct vf_relay_request *asked)
{
	int has_data = asked->op == VF_OP_READ || asked->op == VF_OP_WRITE;

	if (asked->slot >= server->slot_count)
		return "a slot that it does not have";
	if (seat->slot_state[asked->slot] != VF_SLOT_FREE)
		return "a second request for a slot in use";
	if (asked->op > VF_OP_WRITE_ZEROES || asked->flags & ~VF_RELAY_F_ALL || asked->reserved)
		return "an unknown operation";
	if (asked->op != VF_OP_FLUSH && !vf_is_range(asked))
		return "an impossible range";
	if (has_data && asked->len_bytes > VF_RELAY_CHUNK_BYTES)
		return "a range larger than its memory";
	if (server->read_only && asked->op != VF_OP_READ && asked->op != VF_OP_FLUSH)
		return "a write to a read-only device";
	return NULL;
}

static void vf_server_start(struct vf_relay_server *server, struct vf_seat *seat, const struct vf_relay_request *asked)
{
	struct vf_engine *engine = &server->engine;
	int has_data = asked->op == VF_OP_READ || asked->op == VF_OP_WRITE;
	int is_flush = asked->op == VF_OP_FLUSH;
	uint32_t slot = (uint32_t)(seat - server->seat) * server->slot_count + asked->slot;
	struct vf_req *req = &server->req[slot];

	server->iov[slot] = (struct iovec){
		.iov_base = seat->memory + (size_t)asked->slot * VF_RELAY_CHUNK_BYTES,
		.iov_len = has_data ? (size_t)asked->len_bytes : 0,
	};
	*req = (struct vf_req){
		.op = asked->op,
		.unmap = (asked->flags & VF_RELAY_F_UNMAP) != 0,
		.slot = (uint16_t)slot,
		.iov = &server->iov[slot],
		.iov_base = &server->iov[slot],
		.iov_count = (uint32_t)has_data,
		.offset_bytes = is_flush ? 0 : asked->offset_bytes,
		.left_bytes = is_flush ? 0 : asked->len_bytes,
		.data_bytes = is_flush ? 0 : asked->len_bytes,
	};
	seat->slot_state[asked->slot] = VF_SLOT_ASKED;
	seat->asked_count++;
	vf_seat_want_durable(server, seat, (asked->flags & VF_RELAY_F_DURABLE) != 0);
	engine->replaying = (asked->flags & VF_RELAY_F_REPLAY) != 0;
	if (engine->ops->submit(engine, req))
		vf_server_finish(server, req);
}

/* The first packet of a worker. */
static void vf_seat_greet(struct vf_relay_server *server, struct vf_seat *seat)
{
	struct vf_relay_ready ready = { .magic = VF_RELAY_MAGIC };
	struct vf_relay_hello hello;
	ssize_t len = recv(seat->fd, &hello, sizeof(hello), MSG_DONTWAIT | MSG_TRUNC);

	if (len < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (len <= 0)
		vf_seat_leave(server, seat);
	else if (len != (ssize_t)sizeof(hello) || hello.magic != VF_RELAY_MAGIC ||
		 hello.queue != (uint32_t)(seat - server->seat) || hello.slot_count != server->slot_count)
		vf_seat_expel(server, seat, "no hello of this version and queue");
	else if (send(seat->fd, &ready, sizeof(ready), MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)sizeof(ready))
		vf_seat_leave(server, seat);
	else
		seat->welcome = 1;
}

/* Receive one packet of requests. Returns whether there may be more. */
static int vf_seat_take(struct vf_relay_server *server, struct vf_seat *seat)
{
	struct vf_relay_request asked[VF_RELAY_BATCH_MAX];
	ssize_t len = recv(seat->fd, asked, sizeof(asked), MSG_DONTWAIT | MSG_TRUNC);
	const char *wrong;

	if (len < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	if (len <= 0) {
		vf_seat_leave(server, seat);
		return 0;
	}
	if ((size_t)len > sizeof(asked) || (size_t)len % sizeof(asked[0])) {
		vf_seat_expel(server, seat, "a packet of a wrong size");
		return 0;
	}
	for (uint32_t i = 0; i < (size_t)len / sizeof(asked[0]); i++) {
		wrong = vf_server_judge(server, seat, &asked[i]);
		if (wrong) {
			vf_seat_expel(server, seat, wrong);
			return 0;
		}
		vf_server_start(server, seat, &asked[i]);
	}
	return 1;
}

static void vf_seat_hear(struct vf_relay_server *server, struct vf_seat *seat)
{
	if (!seat->welcome) {
		vf_seat_greet(server, seat);
		return;
	}
	for (uint32_t i = 0; i < VF_PACKET_MAX && vf_seat_take(server, seat); i++)
		;
}

/* Accept the newest connection: that of the worker that the supervisor has started last. */
static void vf_seat_accept(struct vf_relay_server *server, struct vf_seat *seat)
{
	int fd = accept4(seat->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (fd < 0)
		return; /* it has gone again */
	if (seat->next_fd >= 0)
		close(seat->next_fd);
	seat->next_fd = fd;
	vf_seat_settle(server, seat);
}

static void vf_server_hear(struct vf_relay_server *server)
{
	struct epoll_event event[VF_EVENT_MAX];
	int count = epoll_wait(server->epoll_fd, event, VF_EVENT_MAX, 0);

	for (int i = 0; i < count; i++) {
		struct vf_seat *seat = &server->seat[event[i].data.u32 / 2u];

		if (event[i].data.u32 % 2u == 0)
			vf_seat_accept(server, seat);
		else if (seat->fd >= 0)
			vf_seat_hear(server, seat);
	}
}

static void vf_server_sleep(struct vf_relay_server *server, int wake_fd)
{
	struct vf_engine *engine = &server->engine;
	int fds[2] = { server->epoll_fd, wake_fd };
	int timeout_ms = server->behind ? VF_BEHIND_MS : VF_TICK_MS;

	if (engine->inflight_count || engine->always) {
		engine->ops->sleep(engine, fds, 2, timeout_ms);
		return;
	}
	struct pollfd polled[2] = { { .fd = fds[0], .events = POLLIN }, { .fd = fds[1], .events = POLLIN } };

	if (poll(polled, 2, timeout_ms) > 0)
		engine->readable |= (uint32_t)(polled[0].revents != 0) | (uint32_t)(polled[1].revents != 0) << 1;
}

int vf_relay_serve(struct vf_relay_server *server, int wake_fd)
{
	struct vf_engine *engine = &server->engine;

	for (;;) {
		uint32_t readable;

		vf_server_hear(server);
		if (engine->ops->flush)
			engine->ops->flush(engine);
		vf_server_reap(server);
		vf_server_send(server);
		vf_server_sleep(server, wake_fd);
		readable = engine->readable;
		engine->readable = 0;
		if (readable & 2u)
			return VF_RELAY_WOKEN;
		if (readable & VF_READABLE_EVENTS)
			return VF_RELAY_EVENTS;
	}
}

/* Of one queue. 0 or -errno. */
static int vf_seat_allocate(struct vf_relay_server *server, struct vf_seat *seat, const struct vf_relay_place *place)
{
	size_t len = vf_server_memory_bytes(server);
	int seals = fcntl(place->memory_fd, F_GET_SEALS);
	struct stat status;
	void *memory;

	if (fstat(place->memory_fd, &status) || seals < 0)
		return -errno;
	if (!(seals & F_SEAL_SHRINK) || (uint64_t)status.st_size < len)
		return -EINVAL; /* pages that a worker could remove would kill us */
	memory = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, place->memory_fd, 0);
	if (memory == MAP_FAILED)
		return -errno;
	vf_core_exclude(memory, len);
	seat->memory = memory;
	seat->listen_fd = place->listen_fd;
	seat->slot_state = calloc(server->slot_count, sizeof(seat->slot_state[0]));
	seat->answer = calloc(server->slot_count, sizeof(seat->answer[0]));
	if (!seat->slot_state || !seat->answer)
		return -ENOMEM;
	return vf_server_watch(server, seat, seat->listen_fd) ? -errno : 0;
}

static int vf_server_allocate(struct vf_relay_server *server, const struct vf_relay_place *place)
{
	uint32_t count = server->queue_count * server->slot_count;
	int err = 0;

	server->req = calloc(count, sizeof(server->req[0]));
	server->iov = calloc(count, sizeof(server->iov[0]));
	if (!server->req || !server->iov)
		return -ENOMEM;
	server->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (server->epoll_fd < 0)
		return -errno;
	for (uint32_t i = 0; i < server->queue_count && !err; i++)
		err = vf_seat_allocate(server, &server->seat[i], &place[i]);
	return err;
}

static void vf_server_free(struct vf_relay_server *server)
{
	for (uint32_t i = 0; i < server->queue_count; i++) {
		struct vf_seat *seat = &server->seat[i];

		if (seat->fd >= 0)
			close(seat->fd);
		if (seat->next_fd >= 0)
			close(seat->next_fd);
		if (seat->memory)
			munmap(seat->memory, vf_server_memory_bytes(server));
		free(seat->slot_state);
		free(seat->answer);
	}
	if (server->epoll_fd >= 0)
		close(server->epoll_fd);
	free(server->iov);
	free(server->req);
	free(server);
}

struct vf_relay_server *vf_relay_open(const struct vf_engine_plugin *plugin, const struct vf_store *store,
				      const struct vf_relay_place *place, uint32_t queue_count, uint32_t slot_count,
				      int read_only)
{
	struct vf_relay_server *server = calloc(1, sizeof(*server));
	int err = -EPROTO;

	if (!server)
		return NULL;
	server->epoll_fd = -1;
	server->slot_count = slot_count;
	server->read_only = read_only != 0;
	for (uint32_t i = 0; i < VF_RELAY_QUEUE_MAX; i++)
		server->seat[i].fd = server->seat[i].next_fd = -1;
	if (queue_count > VF_RELAY_QUEUE_MAX || slot_count == 0 || slot_count > (UINT16_MAX + 1u) / VF_RELAY_QUEUE_MAX) {
		err = -EINVAL;
	} else if (vf_engine_plugin_fits(plugin)) {
		server->queue_count = queue_count;
		err = vf_server_allocate(server, place);
	}
	if (!err) {
		server->engine = (struct vf_engine){ .ops = plugin->ops, .store = *store, .context = plugin->context };
		err = plugin->ops->open ? plugin->ops->open(&server->engine, queue_count * slot_count) : 0;
	}
	if (err) {
		vf_server_free(server);
		errno = -err;
		return NULL;
	}
	return server;
}

void vf_relay_close(struct vf_relay_server *server)
{
	if (server->engine.ops->close)
		server->engine.ops->close(&server->engine);
	vf_server_free(server);
}
