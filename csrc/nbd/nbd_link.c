/* SPDX-License-Identifier: Apache-2.0
 *
 * The connection to a server: made by a thread (nbd_connector.c), watched, replaced when it dies.
 */
#define _GNU_SOURCE
#include "nbd/internal.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/barrier.h"

#define VF_NBD_PAUSE_MAX_NS (1000u * VF_NBD_MS)
#define VF_NBD_ENDING_NS (5000u * VF_NBD_MS) /* a server that takes longer to end a connection is worth a line in the log */
#define VF_NBD_SCAN_NS (50u * VF_NBD_MS)
/* A dead machine sends nothing: TCP probes it after so many seconds of silence. */
#define VF_NBD_SILENCE_S 10
#define VF_NBD_SILENCE_ASK_S 5
#define VF_NBD_SILENCE_ASKS 3
#define VF_NBD_DISCARD_MAX 64u /* reads of unexpected data, per check */

static void vf_nbd_close_fd(struct vf_nbd_link *link)
{
	if (link->fd >= 0)
		close(link->fd);
	link->fd = -1;
}

static void vf_nbd_drop_handle(struct vf_nbd_link *link)
{
	nbd_close(link->handle); /* no completion is called any more, and nothing is received into any buffer */
	link->handle = NULL;
}

/* No connection from now on, for the reason in text. */
static void vf_nbd_down(struct vf_nbd *nbd, uint64_t now_ns)
{
	struct vf_nbd_link *link = &nbd->link;

	if (!link->lost_ns)
		link->lost_ns = now_ns;
	link->state = VF_NBD_DOWN;
	link->next_ns = now_ns + link->pause_ns;
	link->pause_ns = link->pause_ns < VF_NBD_PAUSE_MAX_NS / 2u ? 2u * link->pause_ns : VF_NBD_PAUSE_MAX_NS;
}

/* Note a failed attempt. Each reason is logged once per outage. */
static void vf_nbd_refuse(struct vf_nbd *nbd, const char *text)
{
	struct vf_nbd_link *link = &nbd->link;
	uint64_t now_ns = vf_now_ns();

	vf_nbd_drop_handle(link);
	vf_nbd_close_fd(link);
	vf_nbd_down(nbd, now_ns);
	if (strcmp(link->refused, text) == 0)
		return;
	snprintf(link->refused, sizeof(link->refused), "%s", text);
	vf_nbd_log(&nbd->events, "%s: cannot be used: %s; retrying", nbd->uri, text);
}

/* Whether the memory of a request can be used by a system call: 0, or -EFAULT if pages of the driver's have vanished. */
static int vf_nbd_memory_check(const struct vf_nbd_cmd *cmd)
{
	uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
	uintptr_t first = (uintptr_t)cmd->data & ~(page - 1u);
	uintptr_t end = (uintptr_t)cmd->data + cmd->len_bytes;
	int how = cmd->kind == VF_NBD_READ ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;

	if (cmd->bounce || cmd->len_bytes == 0 || (cmd->kind != VF_NBD_READ && cmd->kind != VF_NBD_WRITE))
		return 0;
	return madvise((void *)first, end - first, how) ? -EFAULT : 0;
}

/* Whether a request modifies the store. */
static int vf_nbd_modifies(const struct vf_nbd_cmd *cmd)
{
	return cmd->kind == VF_NBD_WRITE || cmd->kind == VF_NBD_TRIM || cmd->kind == VF_NBD_ZERO;
}

/* The server may carry out an unfinished command later, over newer data. It closes its end when all are done. */
static void vf_nbd_end(struct vf_nbd_link *link, uint64_t now_ns)
{
	shutdown(link->fd, SHUT_WR);
	link->state = VF_NBD_ENDING;
	link->end_ns = now_ns + VF_NBD_ENDING_NS;
}

/* Reset the commands in flight on a connection that has died of err. Whether the server may still modify the store. */
static int vf_nbd_take_back(struct vf_nbd *nbd, int err, int in_order)
{
	int modifies = 0;

	for (uint32_t i = 0; i < nbd->slot_count; i++) {
		struct vf_nbd_cmd *cmd = &nbd->cmds[i];

		if (!cmd->req || !cmd->sent)
			continue;
		cmd->is_old = (uint8_t)vf_nbd_modifies(cmd);
		modifies |= cmd->is_old;
		if (err == EFAULT && vf_nbd_memory_check(cmd)) {
			vf_nbd_finish(nbd, cmd, -EIO);
			continue;
		}
		if (++cmd->losses == VF_NBD_LOSSES_MAX) {
			vf_nbd_log(&nbd->events, "%s: %u connections have died with a request at %llu; it ends with an error",
				   nbd->uri, cmd->losses, (unsigned long long)cmd->offset_bytes);
			if (!cmd->is_old) {
				vf_nbd_finish(nbd, cmd, -EIO);
				continue;
			}
			vf_nbd_withhold(nbd, cmd, VF_NBD_DOOMED);
		}
		vf_nbd_unsend(nbd, cmd);
		if (cmd->is_old && !in_order)
			vf_nbd_withhold(nbd, cmd, VF_NBD_WITHHELD);
	}
	return modifies;
}

/* Handle the loss of a connection that has served: its commands in flight are reset. */
static void vf_nbd_lose(struct vf_nbd *nbd, int err, const char *text)
{
	struct vf_nbd_link *link = &nbd->link;
	uint64_t now_ns = vf_now_ns();
	int in_order = vf_nbd_ends_in_order(err);
	int modifies;

	/* If connections die one after another of the same cause, only the first is logged. */
	link->flap_count = link->has_served || now_ns - link->up_ns > VF_NBD_PAUSE_MAX_NS ? 0 : link->flap_count + 1u;

	vf_nbd_drop_handle(link);
	nbd->answered_count = 0; /* should any be left: they are asked again */
	modifies = vf_nbd_take_back(nbd, err, in_order);
	vf_nbd_wire_stop(nbd);
	link->refused[0] = '\0';
	vf_nbd_down(nbd, now_ns);
	if (link->flap_count < 2u || strcmp(link->lost_text, text) != 0)
		vf_nbd_log(&nbd->events, "%s: the connection is lost: %s; reconnecting, for %llu s without errors", nbd->uri,
			   text, (unsigned long long)(nbd->config.reconnect_ns / 1000000000u));
	snprintf(link->lost_text, sizeof(link->lost_text), "%s", text);
	if (modifies && in_order) {
		vf_nbd_end(link, now_ns);
		return;
	}
	if (modifies)
		vf_nbd_fence_doubt(nbd, now_ns);
	else
		vf_nbd_fence_end(nbd);
	vf_nbd_close_fd(link);
}

/* The old connection is over: in_order, or without that its end was heard of. */
static void vf_nbd_ended(struct vf_nbd *nbd, int in_order, uint64_t now_ns)
{
	struct vf_nbd_link *link = &nbd->link;

	link->state = VF_NBD_DOWN;
	for (uint32_t i = 0; i < nbd->slot_count; i++) {
		struct vf_nbd_cmd *cmd = &nbd->cmds[i];

		if (cmd->req && cmd->is_old && !in_order)
			vf_nbd_withhold(nbd, cmd, VF_NBD_WITHHELD);
		cmd->is_old = 0;
	}
	if (in_order)
		vf_nbd_fence_end(nbd);
	else
		vf_nbd_fence_doubt(nbd, now_ns);
	vf_nbd_fence_fail(nbd, VF_NBD_DOOMED);
	vf_nbd_close_fd(link);
}

static void vf_nbd_look_ending(struct vf_nbd *nbd, uint64_t now_ns)
{
	struct vf_nbd_link *link = &nbd->link;
	char discarded[16384];
	ssize_t n = 1;

	for (uint32_t i = 0; i < VF_NBD_DISCARD_MAX && n > 0; i++)
		n = recv(link->fd, discarded, sizeof(discarded), MSG_DONTWAIT);
	if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
		vf_nbd_ended(nbd, n == 0 || vf_nbd_ends_in_order(errno), now_ns);
	} else if (link->end_ns && now_ns >= link->end_ns) {
		link->end_ns = 0;
		vf_nbd_log(&nbd->events, "%s: the server has not closed the old connection, and may still work on writes of it: "
			   "nothing is sent before it has; if it hangs, restart it", nbd->uri);
	}
}

static void vf_nbd_connect(struct vf_nbd *nbd)
{
	struct vf_nbd_link *link = &nbd->link;

	link->attempt = vf_nbd_attempt_begin(nbd->uri);
	if (link->attempt)
		link->state = VF_NBD_CONNECTING;
	else
		vf_nbd_refuse(nbd, "no thread can be started to connect");
}

/* Check that an export still fits the device. 0, or -1 with the reason in text. */
static int vf_nbd_check(const struct vf_nbd *nbd, const struct vf_nbd_export *export, char *text, size_t text_bytes)
{
	uint64_t needed = nbd->engine->store.size_bytes;

	if (export->size_bytes < needed)
		snprintf(text, text_bytes, "the export has %llu bytes now, but the device has %llu",
			 (unsigned long long)export->size_bytes, (unsigned long long)needed);
	else if (export->read_only && !nbd->config.read_only)
		snprintf(text, text_bytes, "the export is read-only now");
	else if (export->size_bytes % export->block_min_bytes)
		snprintf(text, text_bytes, "the export has %llu bytes now, no multiple of its block size %u",
			 (unsigned long long)export->size_bytes, export->block_min_bytes);
	else if (export->block_min_bytes > nbd->config.block_size_bytes && !nbd->config.sole)
		snprintf(text, text_bytes, "the export has no blocks below %u bytes now, but the device has blocks of %u",
			 export->block_min_bytes, nbd->config.block_size_bytes);
	else
		return 0;
	return -1;
}

static void vf_nbd_watch_silence(int fd)
{
	const struct { int name; int value; } options[] = {
		{ TCP_KEEPIDLE, VF_NBD_SILENCE_S },
		{ TCP_KEEPINTVL, VF_NBD_SILENCE_ASK_S },
		{ TCP_KEEPCNT, VF_NBD_SILENCE_ASKS },
		{ TCP_USER_TIMEOUT, (VF_NBD_SILENCE_S + VF_NBD_SILENCE_ASK_S * VF_NBD_SILENCE_ASKS) * 1000 },
	};
	int one = 1;

	if (setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one)))
		return;
	for (size_t i = 0; i < sizeof(options) / sizeof(options[0]); i++) /* a Unix socket refuses them, and needs none */
		setsockopt(fd, IPPROTO_TCP, options[i].name, &options[i].value, sizeof(options[i].value));
}

static void vf_nbd_arrive(struct vf_nbd *nbd)
{
	struct vf_nbd_link *link = &nbd->link;
	char text[VF_NBD_TEXT_BYTES];

	if (vf_nbd_export_read(link->handle, &link->export, text, sizeof(text)) ||
	    vf_nbd_check(nbd, &link->export, text, sizeof(text))) {
		vf_nbd_refuse(nbd, text);
		return;
	}
	link->fd = fcntl(nbd_aio_get_fd(link->handle), F_DUPFD_CLOEXEC, 0);
	if (link->fd < 0) {
		vf_nbd_refuse(nbd, "no descriptor is left");
		return;
	}
	vf_nbd_watch_silence(link->fd);
	if (vf_nbd_fence_begin(nbd)) {
		vf_nbd_fence_end(nbd);
		vf_nbd_refuse(nbd, "the kernel does not keep its socket for the next worker");
		return;
	}
	if (link->was_up ? link->flap_count < 2u : link->refused[0])
		vf_nbd_log(&nbd->events, "%s: reconnected after %.1f s", nbd->uri,
			   (double)(vf_now_ns() - link->lost_ns) / 1e9);
	if (nbd_get_tls_negotiated(link->handle) == 0) {
		if (vf_nbd_wire_start(nbd)) {
			vf_nbd_fence_end(nbd);
			vf_nbd_refuse(nbd, "the kernel gives no random numbers");
			return;
		}
		vf_nbd_drop_handle(link); /* the socket is ours now */
	}
	link->state = VF_NBD_UP;
	link->up_ns = vf_now_ns();
	link->lost_ns = 0;
	link->was_up = 1;
	link->leaving = link->outgrown = link->gave_up = link->has_served = 0;
	link->refused[0] = '\0';
	if (link->export.size_bytes > nbd->known_size_bytes) {
		nbd->known_size_bytes = link->export.size_bytes;
		vf_nbd_report_size(&nbd->events, link->export.size_bytes);
	}
	vf_nbd_blocks_reset(nbd);
	for (uint32_t i = 0; i < nbd->slot_count && link->state == VF_NBD_UP; i++) {
		if (nbd->cmds[i].req && !nbd->cmds[i].sent && nbd->cmds[i].fate == VF_NBD_FREE)
			vf_nbd_start(nbd, &nbd->cmds[i]);
	}
	vf_nbd_wire_flush(nbd);
}

static void vf_nbd_look_connecting(struct vf_nbd *nbd)
{
	struct vf_nbd_link *link = &nbd->link;
	char text[VF_NBD_TEXT_BYTES];

	if (!vf_nbd_attempt_is_done(link->attempt))
		return;
	link->handle = vf_nbd_attempt_end(link->attempt, text, sizeof(text));
	link->attempt = NULL;
	if (link->handle)
		vf_nbd_arrive(nbd);
	else
		vf_nbd_refuse(nbd, text);
}

/* End requests that had no reply for too long, and the connection with them, so that a late reply finds no buffer. The server may
 * still carry out modifying ones. They have ended when the connection has, and nothing newer is written before that. */
static void vf_nbd_scan(struct vf_nbd *nbd, uint64_t now_ns)
{
	uint32_t expired_count = 0;
	char text[96];

	nbd->link.scan_ns = now_ns + VF_NBD_SCAN_NS;
	for (uint32_t i = 0; i < nbd->slot_count; i++) {
		const struct vf_nbd_cmd *cmd = &nbd->cmds[i];

		expired_count += cmd->req && cmd->sent && now_ns - cmd->since_ns >= nbd->config.timeout_ns;
	}
	if (!expired_count)
		return;
	/* Before the buffers go back to the driver. */
	vf_nbd_drop_handle(&nbd->link);
	for (uint32_t i = 0; i < nbd->slot_count; i++) {
		struct vf_nbd_cmd *cmd = &nbd->cmds[i];

		if (!cmd->req || !cmd->sent || now_ns - cmd->since_ns < nbd->config.timeout_ns)
			continue;
		if (vf_nbd_modifies(cmd))
			vf_nbd_withhold(nbd, cmd, VF_NBD_DOOMED);
		else
			vf_nbd_finish(nbd, cmd, -ETIMEDOUT);
	}
	snprintf(text, sizeof(text), "%u requests had no reply for %.1f s", expired_count,
		 (double)nbd->config.timeout_ns / 1e9);
	nbd->link.has_served = 1; /* whatever it did: this has to be said */
	vf_nbd_lose(nbd, 0, text);
}

static void vf_nbd_look_up(struct vf_nbd *nbd)
{
	struct vf_nbd_link *link = &nbd->link;
	char text[VF_NBD_TEXT_BYTES];
	int err = 0;
	int rc;

	if (vf_likely(nbd->wire.on)) {
		rc = vf_nbd_wire_look(nbd, text, sizeof(text));
		err = nbd->wire.err;
	} else {
		rc = vf_nbd_tls_look(nbd, text, sizeof(text), &err);
	}
	vf_nbd_digest(nbd);
	if (vf_likely(rc == 0 && !link->leaving && !link->outgrown)) {
		if (nbd->wire.count)
			vf_nbd_wire_flush(nbd); /* what follows from the answers */
		return;
	}
	if (link->leaving)
		snprintf(text, sizeof(text), "the server shuts down");
	else if (link->outgrown)
		snprintf(text, sizeof(text), "the export was smaller when it was made");
	vf_nbd_lose(nbd, err, text);
}

static void vf_nbd_give_up(struct vf_nbd *nbd)
{
	nbd->link.gave_up = 1;
	vf_nbd_log(&nbd->events, "%s: no connection for %llu s: requests end with errors until there is one", nbd->uri,
		   (unsigned long long)(nbd->config.reconnect_ns / 1000000000u));
	for (uint32_t i = 0; i < nbd->slot_count; i++) {
		if (nbd->cmds[i].req)
			vf_nbd_finish(nbd, &nbd->cmds[i], -ENOTCONN);
	}
}

void vf_nbd_link_pump(struct vf_nbd *nbd)
{
	struct vf_nbd_link *link = &nbd->link;
	uint64_t now_ns;

	if (vf_unlikely(link->doubt))
		vf_nbd_fence_look(nbd, vf_now_ns());
	if (vf_likely(link->state == VF_NBD_UP)) {
		vf_nbd_look_up(nbd);
		if (!nbd->config.timeout_ns || link->state != VF_NBD_UP)
			return;
		now_ns = vf_now_ns();
		if (now_ns >= link->scan_ns)
			vf_nbd_scan(nbd, now_ns);
		return;
	}
	now_ns = vf_now_ns();
	if (link->state == VF_NBD_ENDING)
		vf_nbd_look_ending(nbd, now_ns);
	if (link->state == VF_NBD_DOWN && now_ns >= link->next_ns)
		vf_nbd_connect(nbd);
	if (link->state == VF_NBD_CONNECTING)
		vf_nbd_look_connecting(nbd);
	if (link->state != VF_NBD_UP && !link->gave_up && now_ns - link->lost_ns >= nbd->config.reconnect_ns)
		vf_nbd_give_up(nbd);
}

int vf_nbd_link_wants(const struct vf_nbd *nbd, short *events, uint64_t *until_ns)
{
	const struct vf_nbd_link *link = &nbd->link;
	unsigned int direction;

	*events = POLLIN;
	*until_ns = UINT64_MAX;
	if (link->state == VF_NBD_UP && nbd->config.timeout_ns)
		*until_ns = link->scan_ns;
	else if (link->state == VF_NBD_DOWN)
		*until_ns = link->next_ns;
	else if (link->state == VF_NBD_ENDING && link->end_ns)
		*until_ns = link->end_ns;
	if (link->withheld_count && link->doubt && link->doubt_ns < *until_ns)
		*until_ns = link->doubt_ns;
	if (link->state != VF_NBD_UP && !link->gave_up && link->lost_ns + nbd->config.reconnect_ns < *until_ns)
		*until_ns = link->lost_ns + nbd->config.reconnect_ns;
	if (link->state == VF_NBD_ENDING || link->state == VF_NBD_DOWN)
		return link->fd;
	if (link->state == VF_NBD_CONNECTING)
		return vf_nbd_attempt_fd(link->attempt);
	if (nbd->wire.on) {
		*events = (short)(POLLIN | (nbd->wire.count ? POLLOUT : 0));
		return link->fd;
	}
	direction = nbd_aio_get_direction(link->handle);
	*events = (short)((direction & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0) |
			  (direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0));
	return direction ? nbd_aio_get_fd(link->handle) : -1;
}

void vf_nbd_link_send(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	if (vf_likely(nbd->wire.on))
		vf_nbd_wire_put(nbd, cmd);
	else
		vf_nbd_tls_send(nbd, cmd);
}

void vf_nbd_link_open(struct vf_nbd *nbd)
{
	uint64_t now_ns = vf_now_ns();

	nbd->link = (struct vf_nbd_link){ .fd = -1, .lost_ns = now_ns, .pause_ns = VF_NBD_PAUSE_MIN_NS };
	if (vf_nbd_fence_open(nbd, now_ns))
		vf_nbd_end(&nbd->link, now_ns);
	else
		vf_nbd_connect(nbd);
}

/* Whether the connection may be closed without waiting: the server has no command that modifies the store. */
static int vf_nbd_is_at_rest(const struct vf_nbd *nbd)
{
	for (uint32_t i = 0; i < nbd->slot_count; i++) {
		const struct vf_nbd_cmd *cmd = &nbd->cmds[i];

		if (cmd->req && cmd->sent && vf_nbd_modifies(cmd))
			return 0;
	}
	return nbd->link.state == VF_NBD_UP;
}

void vf_nbd_link_close(struct vf_nbd *nbd)
{
	struct vf_nbd_link *link = &nbd->link;
	int is_at_rest = vf_nbd_is_at_rest(nbd);

	if (is_at_rest && nbd->wire.on)
		vf_nbd_wire_leave(nbd);
	else if (is_at_rest)
		nbd_aio_disconnect(link->handle, 0); /* a word of farewell, if it goes out at once */
	vf_nbd_wire_stop(nbd);
	vf_nbd_attempt_leave(link->attempt);
	link->attempt = NULL;
	vf_nbd_drop_handle(link);
	vf_nbd_close_fd(link);
	if (is_at_rest) /* else the next worker has to wait for its end */
		vf_nbd_fence_end(nbd);
	link->state = VF_NBD_DOWN;
}
