/* SPDX-License-Identifier: Apache-2.0
 *
 * The relay's side: packets of the workers' sockets into requests of the one engine, and back.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "barrier.h"
#include "relay.h"

#define VF_EVENT_MAX 16
#define VF_REAP_MAX 64u
#define VF_PACKET_MAX 16u /* of one worker, before it is another's turn */
#define VF_TICK_MS 100
#define VF_BEHIND_MS 5 /* a worker does not take its answers: look again soon */
#define VF_GUEST_MAX (2u * VF_RELAY_QUEUE_MAX) /* connections: one may wait for the end of the one before it */

struct vf_guest {
	int fd; /* -1: no such guest, or one whose requests are finished for nobody */
	uint8_t used;
	uint8_t waits; /* for the guest before it in this queue to be gone */
	uint32_t queue; /* of which it is; ~0: it has not said yet */
	uint8_t *memory;
	uint32_t inflight_count;
	uint32_t answer_count;
	struct vf_relay_answer *answer; /* slot_count of them */
};

struct vf_relay_server {
	struct vf_engine engine;
	int listen_fd; /* borrowed */
	int epoll_fd;
	uint32_t queue_count;
	uint32_t slot_count; /* of a queue */
	struct vf_req *req; /* slot_count of each queue */
	struct iovec *iov; /* one for each */
	struct vf_guest **owner; /* of each; NULL: free */
	uint8_t behind; /* there are answers that could not be sent */
	struct vf_guest guest[VF_GUEST_MAX];
};

static size_t vf_server_memory_bytes(const struct vf_relay_server *server)
{
	return (size_t)server->slot_count * VF_RELAY_CHUNK_BYTES;
}

static struct vf_guest *vf_guest_of(struct vf_relay_server *server, uint32_t queue, int waits)
{
	for (uint32_t i = 0; i < VF_GUEST_MAX; i++) {
		struct vf_guest *guest = &server->guest[i];

		if (guest->used && guest->queue == queue && guest->waits == waits)
			return guest;
	}
	return NULL;
}

static void vf_guest_forget(struct vf_relay_server *server, struct vf_guest *guest)
{
	if (guest->memory)
		munmap(guest->memory, vf_server_memory_bytes(server));
	free(guest->answer);
	*guest = (struct vf_guest){ .fd = -1 };
}

/* Tell a guest that its queue is its own. */
static void vf_guest_welcome(struct vf_guest *guest)
{
	struct vf_relay_ready ready = { .magic = VF_RELAY_MAGIC };

	guest->waits = 0;
	/* One that has gone meanwhile is noticed by its socket. */
	(void)!send(guest->fd, &ready, sizeof(ready), MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Once nobody is there any more, and nothing in flight: the queue's next guest. */
static void vf_guest_settle(struct vf_relay_server *server, struct vf_guest *guest)
{
	uint32_t queue = guest->queue;
	int waited = guest->waits;
	struct vf_guest *next;

	if (guest->fd >= 0 || guest->inflight_count)
		return;
	vf_guest_forget(server, guest);
	if (waited || queue == UINT32_MAX)
		return;
	next = vf_guest_of(server, queue, 1);
	if (next)
		vf_guest_welcome(next);
}

static void vf_guest_leave(struct vf_relay_server *server, struct vf_guest *guest)
{
	if (guest->fd >= 0)
		close(guest->fd); /* and with it its place in the epoll set */
	guest->fd = -1;
	guest->answer_count = 0;
	vf_guest_settle(server, guest);
}

static void vf_guest_send(struct vf_relay_server *server, struct vf_guest *guest)
{
	uint32_t sent = 0;

	while (sent < guest->answer_count) {
		uint32_t left = guest->answer_count - sent;
		uint32_t count = left < VF_RELAY_BATCH_MAX ? left : VF_RELAY_BATCH_MAX;
		size_t len = count * sizeof(guest->answer[0]);

		if (send(guest->fd, &guest->answer[sent], len, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)len) {
			if (errno != EAGAIN && errno != EINTR) {
				vf_guest_leave(server, guest);
				return;
			}
			server->behind = 1;
			break;
		}
		sent += count;
	}
	guest->answer_count -= sent;
	memmove(guest->answer, guest->answer + sent, guest->answer_count * sizeof(guest->answer[0]));
}

static void vf_server_send(struct vf_relay_server *server)
{
	server->behind = 0;
	for (uint32_t i = 0; i < VF_GUEST_MAX; i++) {
		if (server->guest[i].answer_count)
			vf_guest_send(server, &server->guest[i]);
	}
}

static void vf_server_finish(struct vf_relay_server *server, struct vf_req *req)
{
	struct vf_guest *guest = server->owner[req->slot];

	server->owner[req->slot] = NULL;
	guest->inflight_count--;
	if (guest->fd >= 0)
		guest->answer[guest->answer_count++] = (struct vf_relay_answer){
			.slot = req->slot % server->slot_count,
			.result = req->result,
		};
	else
		vf_guest_settle(server, guest);
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

/* Start a request. 0, or -1: no guest of ours asks for this. */
static int vf_server_start(struct vf_relay_server *server, struct vf_guest *guest, const struct vf_relay_request *asked)
{
	struct vf_engine *engine = &server->engine;
	int has_data = asked->op == VF_OP_READ || asked->op == VF_OP_WRITE;
	uint32_t slot = guest->queue * server->slot_count + asked->slot;
	struct vf_req *req = &server->req[slot];

	if (asked->slot >= server->slot_count || server->owner[slot] || asked->op > VF_OP_WRITE_ZEROES ||
	    (has_data && asked->len_bytes > VF_RELAY_CHUNK_BYTES))
		return -1;
	server->iov[slot] = (struct iovec){
		.iov_base = guest->memory + (size_t)asked->slot * VF_RELAY_CHUNK_BYTES,
		.iov_len = (size_t)asked->len_bytes,
	};
	*req = (struct vf_req){
		.op = asked->op,
		.unmap = (asked->flags & VF_RELAY_F_UNMAP) != 0,
		.slot = (uint16_t)slot,
		.iov = &server->iov[slot],
		.iov_base = &server->iov[slot],
		.iov_count = has_data,
		.offset_bytes = asked->offset_bytes,
		.left_bytes = asked->len_bytes,
		.data_bytes = asked->len_bytes,
	};
	server->owner[slot] = guest;
	guest->inflight_count++;
	engine->store.write_flags = (asked->flags & VF_RELAY_F_DURABLE) != 0;
	if (engine->ops->submit(engine, req))
		vf_server_finish(server, req);
	return 0;
}

/* The memory that came with a hello, mapped; NULL: it is not such. */
static uint8_t *vf_server_map(const struct vf_relay_server *server, int fd)
{
	struct stat status;
	void *memory;
	int seals = fcntl(fd, F_GET_SEALS);

	if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(fd, &status) ||
	    (uint64_t)status.st_size < vf_server_memory_bytes(server))
		return NULL;
	memory = mmap(NULL, vf_server_memory_bytes(server), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	return memory == MAP_FAILED ? NULL : memory;
}

/* The descriptor in a message, -1: none. */
static int vf_message_fd(struct msghdr *message)
{
	struct cmsghdr *header = CMSG_FIRSTHDR(message);
	int fd = -1;

	if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS &&
	    header->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(&fd, CMSG_DATA(header), sizeof(int));
	return fd;
}

/* 0, or -1: that is no guest. */
static int vf_guest_enter(struct vf_relay_server *server, struct vf_guest *guest)
{
	struct vf_relay_hello hello = { 0 };
	struct iovec iov = { .iov_base = &hello, .iov_len = sizeof(hello) };
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control;
	struct msghdr message = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control.space),
	};
	ssize_t len = recvmsg(guest->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	int fd = len > 0 ? vf_message_fd(&message) : -1;

	if (len == (ssize_t)sizeof(hello) && fd >= 0 && hello.magic == VF_RELAY_MAGIC &&
	    hello.queue < server->queue_count && hello.slot_count == server->slot_count &&
	    !vf_guest_of(server, hello.queue, 1))
		guest->memory = vf_server_map(server, fd);
	if (fd >= 0)
		close(fd);
	guest->answer = guest->memory ? calloc(server->slot_count, sizeof(guest->answer[0])) : NULL;
	if (!guest->answer)
		return -1;
	guest->waits = vf_guest_of(server, hello.queue, 0) != NULL;
	guest->queue = hello.queue;
	if (!guest->waits)
		vf_guest_welcome(guest);
	return 0;
}

static void vf_guest_hear(struct vf_relay_server *server, struct vf_guest *guest)
{
	struct vf_relay_request asked[VF_RELAY_BATCH_MAX];

	if (guest->queue == UINT32_MAX) {
		if (vf_guest_enter(server, guest))
			vf_guest_leave(server, guest);
		return;
	}
	for (uint32_t i = 0; i < VF_PACKET_MAX; i++) {
		ssize_t len = recv(guest->fd, asked, sizeof(asked), MSG_DONTWAIT);

		if (len < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (len <= 0 || guest->waits) { /* nobody asks before the welcome */
			vf_guest_leave(server, guest);
			return;
		}
		for (uint32_t j = 0; j < (size_t)len / sizeof(asked[0]); j++) {
			if (vf_server_start(server, guest, &asked[j])) {
				vf_guest_leave(server, guest);
				return;
			}
		}
	}
}

static void vf_server_accept(struct vf_relay_server *server)
{
	int fd = accept4(server->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	struct epoll_event event = { .events = EPOLLIN };

	if (fd < 0)
		return; /* it has gone again */
	for (uint32_t i = 0; i < VF_GUEST_MAX; i++) {
		if (server->guest[i].used)
			continue;
		event.data.u32 = i;
		if (epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, fd, &event))
			break;
		server->guest[i] = (struct vf_guest){ .fd = fd, .used = 1, .queue = UINT32_MAX };
		return;
	}
	close(fd);
}

static void vf_server_hear(struct vf_relay_server *server)
{
	struct epoll_event event[VF_EVENT_MAX];
	int count = epoll_wait(server->epoll_fd, event, VF_EVENT_MAX, 0);

	for (int i = 0; i < count; i++) {
		uint32_t place = event[i].data.u32;

		if (place == VF_GUEST_MAX)
			vf_server_accept(server);
		else if (server->guest[place].used && server->guest[place].fd >= 0)
			vf_guest_hear(server, &server->guest[place]);
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
		if (readable & VF_READABLE_NEWS)
			return VF_RELAY_NEWS;
	}
}

static int vf_server_allocate(struct vf_relay_server *server)
{
	uint32_t count = server->queue_count * server->slot_count;
	struct epoll_event event = { .events = EPOLLIN, .data = { .u32 = VF_GUEST_MAX } };

	server->req = calloc(count, sizeof(server->req[0]));
	server->iov = calloc(count, sizeof(server->iov[0]));
	server->owner = calloc(count, sizeof(struct vf_guest *));
	if (!server->req || !server->iov || !server->owner)
		return -ENOMEM;
	for (uint32_t i = 0; i < VF_GUEST_MAX; i++)
		server->guest[i].fd = -1;
	server->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (server->epoll_fd < 0 || epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, server->listen_fd, &event))
		return -errno;
	return 0;
}

static void vf_server_free(struct vf_relay_server *server)
{
	for (uint32_t i = 0; i < VF_GUEST_MAX; i++) {
		if (server->guest[i].fd >= 0)
			close(server->guest[i].fd);
		vf_guest_forget(server, &server->guest[i]);
	}
	if (server->epoll_fd >= 0)
		close(server->epoll_fd);
	free(server->owner);
	free(server->iov);
	free(server->req);
	free(server);
}

struct vf_relay_server *vf_relay_open(const struct vf_engine_plugin *plugin, const struct vf_store *store, int listen_fd,
				      uint32_t queue_count, uint32_t slot_count)
{
	struct vf_relay_server *server = calloc(1, sizeof(*server));
	int err = -EPROTO;

	if (!server)
		return NULL;
	server->listen_fd = listen_fd;
	server->epoll_fd = -1;
	server->queue_count = queue_count;
	server->slot_count = slot_count;
	if (queue_count > VF_RELAY_QUEUE_MAX || queue_count * slot_count > UINT16_MAX + 1u)
		err = -EINVAL;
	else if (vf_engine_plugin_fits(plugin))
		err = vf_server_allocate(server);
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
