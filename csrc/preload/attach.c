/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/stat.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/sysmacros.h>
#include <sys/un.h>

#include "base/membarrier.h"
#include "preload/attach.h"
#include "preload/forked.h"
#include "preload/pieces.h"
#include "preload/signals.h"

#define VF_ATTACH_VARIABLE "VDUSEFAST_ATTACH"
#define VF_SPIN_VARIABLE "VDUSEFAST_SPIN_US"
#define VF_OWN_FDS_MAX 4096
#define VF_OWN_FDS_ROOM 400 /* so far below the limit are ours */
#define VF_ATTACH_ANSWER_MS 60000

static pthread_mutex_t vf_attach_lock = PTHREAD_MUTEX_INITIALIZER; /* attaching, and one request at a time on the socket */
static uint64_t vf_attach_mask; /* the signals of the thread that has it: no handler runs there */
static struct vf_client *vf_the_client;
static struct vf_client *vf_before_fork; /* users of the parent refer to it */
static struct vf_disk_info vf_info;
static char vf_info_path[VF_ATTACH_PATH_MAX];
static uint64_t vf_own_fds[VF_OWN_FDS_MAX / 64];
static bool vf_failed; /* it was said why */
static bool vf_gone_said;

static void vf_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void vf_say(const char *format, ...)
{
	char line[512] = "vdusefast: ";
	size_t start = strlen(line);
	va_list arguments;

	va_start(arguments, format);
	int count = vsnprintf(line + start, sizeof(line) - start - 1, format, arguments);
	va_end(arguments);
	size_t total = start + (size_t)(count < 0 ? 0 : count);
	if (total > sizeof(line) - 1)
		total = sizeof(line) - 1;
	line[total++] = '\n';
	if (syscall(SYS_write, 2, line, total) < 0)
		return; /* nobody reads it */
}

static void vf_attach_take(void)
{
	uint64_t mask;

	vf_signals_block(&mask);
	pthread_mutex_lock(&vf_attach_lock);
	vf_attach_mask = mask;
}

static void vf_attach_leave(void)
{
	uint64_t mask = vf_attach_mask;

	pthread_mutex_unlock(&vf_attach_lock);
	vf_signals_restore(&mask);
}

/* -- descriptors of ours */

static void vf_own_note(int fd, bool ours)
{
	if (fd < 0 || fd >= VF_OWN_FDS_MAX)
		return;
	uint64_t bit = 1ull << fd % 64;
	if (ours)
		vf_fetch_or_u64(&vf_own_fds[fd / 64], bit);
	else
		vf_fetch_and_u64(&vf_own_fds[fd / 64], ~bit);
}

bool vf_disk_owns_fd(int fd)
{
	return fd >= 0 && fd < VF_OWN_FDS_MAX && (vf_peek_u64(&vf_own_fds[fd / 64]) >> fd % 64 & 1u);
}

void vf_own_close(int fd)
{
	if (fd < 0)
		return;
	vf_own_note(fd, false);
	syscall(SYS_close, fd);
}

int vf_own_take(int fd)
{
	struct rlimit limit = { 1024, 1024 };
	syscall(SYS_prlimit64, 0, RLIMIT_NOFILE, NULL, &limit);
	long most = limit.rlim_cur < 1024 ? (long)limit.rlim_cur : 1024;
	long base = most > 2 * VF_OWN_FDS_ROOM ? most - VF_OWN_FDS_ROOM : 3;
	long moved = syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, base);
	if (moved < 0)
		moved = syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 3);
	int number = errno;
	syscall(SYS_close, fd);
	if (moved < 0) {
		errno = number;
		return -1;
	}
	vf_own_note((int)moved, true);
	return (int)moved;
}

/* -- the socket; the caller holds vf_attach_lock */

static int vf_attach_send(int sock, const struct vf_attach_message *message, int fd)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec iov = { (void *)(uintptr_t)message, sizeof(*message) };
	struct msghdr header = { .msg_iov = &iov, .msg_iovlen = 1 };
	long rc;

	if (fd >= 0) {
		memset(&control, 0, sizeof(control));
		header.msg_control = control.bytes;
		header.msg_controllen = sizeof(control.bytes);
		struct cmsghdr *part = CMSG_FIRSTHDR(&header);
		part->cmsg_level = SOL_SOCKET;
		part->cmsg_type = SCM_RIGHTS;
		part->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(part), &fd, sizeof(int));
	}
	do
		rc = syscall(SYS_sendmsg, sock, &header, MSG_NOSIGNAL);
	while (rc < 0 && errno == EINTR);
	return rc < 0 ? -errno : 0;
}

static int vf_attach_receive(int sock, struct vf_attach_message *message, int fds[2])
{
	union {
		char bytes[CMSG_SPACE(2 * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec iov = { message, sizeof(*message) };
	struct msghdr header = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)
	};
	struct pollfd ready = { sock, POLLIN, 0 };
	struct timespec limit = { VF_ATTACH_ANSWER_MS / 1000, 0 };
	long rc;

	fds[0] = fds[1] = -1;
	do
		rc = syscall(SYS_ppoll, &ready, 1, &limit, NULL, 0);
	while (rc < 0 && errno == EINTR);
	if (rc <= 0)
		return rc < 0 ? -errno : -ETIMEDOUT;
	do
		rc = syscall(SYS_recvmsg, sock, &header, MSG_CMSG_CLOEXEC);
	while (rc < 0 && errno == EINTR);
	if (rc < 0)
		return -errno;
	struct cmsghdr *part = CMSG_FIRSTHDR(&header);
	if (part && part->cmsg_level == SOL_SOCKET && part->cmsg_type == SCM_RIGHTS)
		memcpy(fds, CMSG_DATA(part), part->cmsg_len >= CMSG_LEN(2 * sizeof(int)) ? 2 * sizeof(int) : sizeof(int));
	int number = rc == 0 ? -ECONNRESET : rc != (long)sizeof(*message) ? -EPROTO : -message->error;
	if (number == 0 && (header.msg_flags & MSG_CTRUNC))
		number = -EMFILE; /* of this process */
	for (int i = 0; i < 2 && number; i++)
		if (fds[i] >= 0) {
			syscall(SYS_close, fds[i]);
			fds[i] = -1;
		}
	return number;
}

static int vf_attach_ask(struct vf_client *client, struct vf_attach_message *message, int fd, int fds[2])
{
	int rc = client->mute ? -ESHUTDOWN : vf_attach_send(client->socket, message, fd);

	if (rc == 0)
		rc = vf_attach_receive(client->socket, message, fds);
	/* What is in flight continues: that needs no answers. */
	if (rc == -ETIMEDOUT)
		vf_store_relaxed_u32(&client->mute, 1);
	return rc;
}

int vf_client_ask(struct vf_client *client, struct vf_attach_message *message, int fd, int fds[2])
{
	vf_attach_take();
	int rc = client == vf_the_client ? vf_attach_ask(client, message, fd, fds) : -ESHUTDOWN;
	vf_attach_leave();
	return rc;
}

void vf_client_tell(struct vf_client *client, const struct vf_attach_message *message)
{
	vf_attach_take();
	if (client == vf_the_client)
		vf_attach_send(client->socket, message, -1); /* a server that is gone has no need of it */
	vf_attach_leave();
}

bool vf_client_is_gone(void *context)
{
	struct vf_client *client = context;
	char byte;

	if (vf_load_relaxed_u32(&client->gone))
		return true;
	bool gone = vf_load_relaxed_u32(&client->view.board->closed);
	/* Answers come only to who asks, with the lock: there is nothing to read but the end, and answers that came late. */
	if (!gone && client == vf_the_client) {
		int flags = vf_load_relaxed_u32(&client->mute) ? MSG_DONTWAIT : MSG_PEEK | MSG_DONTWAIT;
		long rc = syscall(SYS_recvfrom, client->socket, &byte, 1, flags, NULL, NULL);
		gone = rc == 0 || (rc < 0 && errno != EAGAIN && errno != EINTR);
	}
	if (gone) {
		vf_store_release_u32(&client->gone, 1);
		if (!vf_gone_said)
			vf_say("%s: the server of this disk has ended; all requests fail with EIO", vf_info_path);
		vf_gone_said = true;
	}
	return gone;
}

/* -- attaching */

static int vf_attach_connect(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	if (strlen(path) >= sizeof(address.sun_path)) {
		vf_say("$" VF_ATTACH_VARIABLE " is longer than a socket's path may be: %s", path);
		return -ENAMETOOLONG;
	}
	memcpy(address.sun_path, path, strlen(path) + 1u);
	long fd = syscall(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	if (syscall(SYS_connect, fd, &address, sizeof(address)) < 0) {
		int number = errno;
		syscall(SYS_close, fd);
		return -number;
	}
	int own = vf_own_take((int)fd);
	return own < 0 ? -errno : own;
}

static int vf_attach_events(struct vf_client *client, uint32_t queue)
{
	struct vf_attach_message message = { .op = VF_ATTACH_EVENTS, .arg = queue };
	int fds[2];
	int rc = vf_attach_ask(client, &message, -1, fds);

	if (rc)
		return rc;
	int *places[2] = { &client->view.kick_fds[queue], &client->view.irq_fds[queue] };
	for (int i = 0; i < 2; i++) {
		if (*places[i] >= 0) {
			/* Others may be using the number: it stays. */
			syscall(SYS_dup3, fds[i], *places[i], O_CLOEXEC);
			syscall(SYS_close, fds[i]);
		} else {
			*places[i] = fds[i] < 0 ? -1 : vf_own_take(fds[i]);
		}
	}
	return *places[0] < 0 || *places[1] < 0 ? -EMFILE : 0;
}

void vf_client_refresh(struct vf_client *client)
{
	uint32_t now = vf_load_acquire_u32(&client->view.board->generation);

	if (now == vf_load_relaxed_u32(&client->generation))
		return;
	vf_attach_take();
	if (client == vf_the_client) {
		for (uint32_t q = 0; q < client->geometry.queue_count; q++)
			if (vf_attach_events(client, q))
				goto unlock; /* no descriptors now: the next kick tries again; if the server has ended, a wait notices */
		vf_store_relaxed_u32(&client->generation, now);
	}
unlock:
	vf_attach_leave();
}

static int vf_attach_map(struct vf_client *client, const struct vf_attach_message *hello, int fd)
{
	struct vf_board *board = (struct vf_board *)(uintptr_t)hello->a;

	/* A child of fork() has it already. */
	if (vf_info.path == NULL) {
		long at = syscall(SYS_mmap, hello->a, hello->b, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0L);
		if (at == -1)
			return -errno;
		if ((uint64_t)at != hello->a) { /* a kernel before 4.17 */
			syscall(SYS_munmap, at, hello->b);
			return -EEXIST;
		}
		syscall(SYS_madvise, at, hello->b, MADV_DONTDUMP);
	}
	struct vf_board_geometry geometry = board->geometry;
	if (board->magic != VF_BOARD_MAGIC || !vf_board_geometry_good(&geometry))
		return -EPROTO;
	vf_board_view_init(&client->view, board, &geometry);
	if (client->view.total_bytes != hello->b)
		return -EPROTO;
	client->geometry = geometry;
	return 0;
}

static int vf_attach_start(struct vf_client *client)
{
	struct vf_attach_message hello = { .op = VF_ATTACH_HELLO, .a = VF_BOARD_MAGIC };
	int fds[2];
	int rc = vf_attach_ask(client, &hello, -1, fds);

	if (rc)
		return rc;
	rc = vf_attach_map(client, &hello, fds[0]);
	if (fds[0] >= 0)
		syscall(SYS_close, fds[0]);
	if (rc)
		return rc;
	client->joined = vf_membarrier_join();
	client->generation = vf_load_acquire_u32(&client->view.board->generation);
	for (uint32_t q = 0; q < client->geometry.queue_count && rc == 0; q++)
		rc = vf_attach_events(client, q);
	client->pieces = calloc((size_t)client->geometry.queue_count * client->geometry.slot_count, sizeof(*client->pieces));
	if (!client->pieces)
		rc = -ENOMEM;
	const char *spin = getenv(VF_SPIN_VARIABLE);
	client->spin_ns = spin && *spin ? strtoull(spin, NULL, 10) * 1000u : client->geometry.spin_ns;
	return rc;
}

static void vf_attach_describe(const struct vf_client *client, const char *path)
{
	const struct vf_board_geometry *g = &client->geometry;
	struct statx status;

	memcpy(vf_info_path, path, strlen(path) + 1u);
	if (syscall(SYS_statx, AT_FDCWD, path, 0, STATX_BASIC_STATS, &status) == 0) {
		vf_info.stand_in_dev = makedev(status.stx_dev_major, status.stx_dev_minor);
		vf_info.stand_in_ino = status.stx_ino;
	}
	vf_info.capacity_bytes = g->capacity_bytes;
	vf_info.capacity_at = &client->view.board->geometry.capacity_bytes;
	vf_info.block_bytes = g->block_bytes;
	vf_info.physical_block_bytes = g->physical_block_bytes;
	vf_info.io_min_bytes = g->io_min_bytes;
	vf_info.io_opt_bytes = g->io_opt_bytes;
	vf_info.queue_count = g->queue_count;
	vf_info.discard_max_bytes = g->discard_max_bytes;
	vf_info.discard_granularity_bytes = g->discard_granularity_bytes;
	vf_info.write_zeroes_max_bytes = g->write_zeroes_max_bytes;
	vf_info.read_only = g->read_only;
	memcpy(vf_info.serial, g->serial, sizeof(vf_info.serial));
	vf_info.serial[sizeof(vf_info.serial) - 1u] = '\0';
	vf_info.path = vf_info_path;
}

static void vf_attach_drop(struct vf_client *client)
{
	for (uint32_t q = 0; q < VF_BOARD_QUEUES_MAX; q++) {
		vf_own_close(client->view.kick_fds[q]);
		vf_own_close(client->view.irq_fds[q]);
	}
	vf_own_close(client->socket);
	free(client->pieces);
	free(client);
}

static void vf_fork_prepare(void)
{
	vf_memory_lock();
	vf_attach_take();
}

static void vf_fork_parent(void)
{
	vf_attach_leave();
	vf_memory_unlock();
}

static void vf_fork_child(void)
{
	struct vf_client *client = vf_the_client;

	vf_the_client = NULL;
	vf_memory_forget_regions();
	vf_attach_leave();
	vf_memory_unlock();
	/* The connection is the parent's. Its users may be remembered by the program: the client's memory stays. */
	if (client) {
		client->before_fork = vf_before_fork;
		vf_before_fork = client;
		for (uint32_t q = 0; q < client->geometry.queue_count; q++) {
			vf_own_close(client->view.kick_fds[q]);
			vf_own_close(client->view.irq_fds[q]);
		}
		vf_own_close(client->socket);
	}
}

/* As the handlers of fork(), in a child without them; other threads had the locks, if any. */
static void vf_fork_unprepared(void)
{
	vf_memory_lock_again();
	vf_attach_lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
	vf_attach_take();
	vf_fork_child();
}

/* Before the constructors of the callers: fork() runs the latest handler first, so it takes locks in the order in which calls
 * take them, theirs before ours. */
__attribute__((constructor(102))) static void vf_attach_load(void)
{
	pthread_atfork(vf_fork_prepare, vf_fork_parent, vf_fork_child);
	vf_fork_when_unprepared(vf_fork_unprepared);
}

/* With the lock held. NULL with errno. */
static struct vf_client *vf_attach_now(const char *path)
{
	struct vf_client *client = calloc(1, sizeof(*client));
	if (!client) {
		errno = ENOMEM;
		return NULL;
	}
	for (uint32_t q = 0; q < VF_BOARD_QUEUES_MAX; q++)
		client->view.kick_fds[q] = client->view.irq_fds[q] = -1;
	int rc = client->socket = vf_attach_connect(path);
	if (rc >= 0)
		rc = vf_attach_start(client);
	if (rc < 0) {
		const char *why = rc == -EEXIST ? "its memory is in use in this program" : strerror(-rc);
		if (!vf_failed)
			vf_say("%s: cannot attach to this disk: %s", path, why);
		vf_failed = true;
		vf_attach_drop(client);
		errno = ENXIO;
		return NULL;
	}
	if (!vf_info.path)
		vf_attach_describe(client, path);
	vf_store_release_pointer(&vf_the_client, client);
	return client;
}

struct vf_client *vf_client_now(void)
{
	return vf_peek_acquire_pointer(&vf_the_client);
}

struct vf_client *vf_client_get(void)
{
	vf_fork_check();
	struct vf_client *client = vf_client_now();
	if (client)
		return client;
	vf_attach_take();
	client = vf_the_client;
	const char *path = vf_info.path ? vf_info.path : getenv(VF_ATTACH_VARIABLE);
	if (client) {
		/* another thread did it */
	} else if (!path || !*path) {
		errno = ENOENT;
	} else if (vf_failed) {
		errno = ENXIO;
	} else {
		client = vf_attach_now(path);
	}
	int number = errno;
	vf_attach_leave();
	errno = number;
	return client;
}

const struct vf_disk_info *vf_disk_attach(void)
{
	return vf_info.path || vf_client_get() ? &vf_info : NULL;
}

uint64_t vf_disk_capacity(void)
{
	struct vf_client *client = vf_client_get();

	return client ? vf_load_relaxed_u64(&client->view.board->geometry.capacity_bytes) : vf_info.capacity_bytes;
}
