/* SPDX-License-Identifier: Apache-2.0
 *
 * Requests and simple replies on a socket after libnbd's handshake. One system call sends all requests of a round, and one
 * receives the replies. libnbd itself needs three system calls per request. Under TLS the socket belongs to libnbd.
 *
 * Source: doc/proto.md of the NBD project, "Transmission phase".
 */
#define _GNU_SOURCE
#include "nbd/internal.h"

#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>

#include "base/barrier.h"

#define VF_NBD_REQUEST_MAGIC 0x25609513u
#define VF_NBD_REPLY_MAGIC 0x67446698u
#define VF_NBD_REPLY_BYTES 16u
#define VF_NBD_CMD_DISC 2u
#define VF_NBD_IN_BYTES (256u << 10)
/* While large reads are out, so little is taken beside the data that is received where it belongs: no more is copied. */
#define VF_NBD_IN_SMALL_BYTES 1024u
#define VF_NBD_LARGE_BYTES (32u << 10)
#define VF_NBD_OUT_IOVS 128u
#define VF_NBD_LOOKS_MAX 64u
#define VF_NBD_SLOT_MASK 0xffffu /* of a cookie */

static const uint16_t vf_nbd_types[] = {
	[VF_NBD_READ] = 0, [VF_NBD_WRITE] = 1, [VF_NBD_FLUSH] = 3, [VF_NBD_TRIM] = 4, [VF_NBD_ZERO] = 6,
};

_Static_assert(sizeof(struct vf_nbd_request) == 28, "doc/proto.md: request message");

/* One round of SipHash. */
static inline void vf_nbd_sip_round(uint64_t *v)
{
	v[0] += v[1];
	v[1] = (v[1] << 13 | v[1] >> 51) ^ v[0];
	v[0] = v[0] << 32 | v[0] >> 32;
	v[2] += v[3];
	v[3] = (v[3] << 16 | v[3] >> 48) ^ v[2];
	v[0] += v[3];
	v[3] = (v[3] << 21 | v[3] >> 43) ^ v[0];
	v[2] += v[1];
	v[1] = (v[1] << 17 | v[1] >> 47) ^ v[2];
	v[2] = v[2] << 32 | v[2] >> 32;
}

/* SipHash-2-4 of one word, under the key of this connection. */
static uint64_t vf_nbd_sip(const uint64_t *key, uint64_t word)
{
	const uint64_t end = (uint64_t)sizeof(word) << 56;
	uint64_t v[4] = { key[0] ^ 0x736f6d6570736575u, key[1] ^ 0x646f72616e646f6du, key[0] ^ 0x6c7967656e657261u,
			  key[1] ^ 0x7465646279746573u ^ word };

	vf_nbd_sip_round(v);
	vf_nbd_sip_round(v);
	v[0] ^= word;
	v[3] ^= end;
	vf_nbd_sip_round(v);
	vf_nbd_sip_round(v);
	v[0] ^= end;
	v[2] ^= 0xff;
	for (uint32_t i = 0; i < 4u; i++)
		vf_nbd_sip_round(v);
	return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* A cookie that cannot be guessed, not even from earlier ones or from those of the same slot. */
static uint64_t vf_nbd_cookie(struct vf_nbd_wire *wire, uint32_t slot)
{
	uint64_t bits;

	do
		bits = vf_nbd_sip(wire->key, ++wire->seq) & ~(uint64_t)VF_NBD_SLOT_MASK;
	while (vf_unlikely(bits == 0)); /* 0 stands for no cookie */
	return bits | slot;
}

static void vf_nbd_request_make(struct vf_nbd_request *request, uint16_t type, uint16_t flags, uint64_t cookie,
				uint64_t offset_bytes, uint32_t len_bytes)
{
	*request = (struct vf_nbd_request){
		.magic = htobe32(VF_NBD_REQUEST_MAGIC),
		.flags = htobe16(flags),
		.type = htobe16(type),
		.cookie = htobe64(cookie),
		.offset_bytes = htobe64(offset_bytes),
		.len_bytes = htobe32(len_bytes),
	};
}

static int vf_nbd_is_large(const struct vf_nbd_cmd *cmd)
{
	return cmd->kind == VF_NBD_READ && cmd->len_bytes >= VF_NBD_LARGE_BYTES;
}

int vf_nbd_wire_open(struct vf_nbd *nbd)
{
	struct vf_nbd_wire *wire = &nbd->wire;

	*wire = (struct vf_nbd_wire){ .queue = calloc(nbd->slot_count, sizeof(*wire->queue)),
				      .in = malloc(VF_NBD_IN_BYTES) };
	if (wire->queue && wire->in)
		return 0;
	vf_nbd_wire_close(nbd);
	return -ENOMEM;
}

void vf_nbd_wire_close(struct vf_nbd *nbd)
{
	free(nbd->wire.queue);
	free(nbd->wire.in);
	nbd->wire.queue = NULL;
	nbd->wire.in = NULL;
}

int vf_nbd_wire_start(struct vf_nbd *nbd)
{
	nbd->wire = (struct vf_nbd_wire){ .queue = nbd->wire.queue, .in = nbd->wire.in, .on = 1 };
	if (getrandom(nbd->wire.key, sizeof(nbd->wire.key), 0) == (ssize_t)sizeof(nbd->wire.key))
		return 0;
	nbd->wire.on = 0;
	return -1;
}

void vf_nbd_wire_stop(struct vf_nbd *nbd)
{
	nbd->wire.on = 0;
	nbd->wire.count = 0;
	nbd->wire.into = NULL;
	for (uint32_t i = 0; i < nbd->slot_count; i++)
		vf_nbd_cmd_disarm(&nbd->cmds[i]);
}

void vf_nbd_wire_leave(struct vf_nbd *nbd)
{
	struct vf_nbd_request request;
	ssize_t sent;

	if (nbd->wire.count)
		return;
	vf_nbd_request_make(&request, VF_NBD_CMD_DISC, 0, 0, 0, 0);
	sent = send(nbd->link.fd, &request, sizeof(request), MSG_NOSIGNAL | MSG_DONTWAIT);
	(void)sent; /* a word of farewell */
}

void vf_nbd_wire_put(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	struct vf_nbd_wire *wire = &nbd->wire;
	uint32_t slot = (uint32_t)(cmd - nbd->cmds);
	uint32_t at = wire->head + wire->count;

	cmd->cookie = vf_nbd_cookie(wire, slot);
	vf_nbd_request_make(&cmd->request, vf_nbd_types[cmd->kind], cmd->flags, cmd->cookie, cmd->offset_bytes, cmd->len_bytes);
	cmd->queued = 1;
	wire->queue[at >= nbd->slot_count ? at - nbd->slot_count : at] = (uint16_t)slot;
	wire->count++;
	wire->large_count += (uint32_t)vf_nbd_is_large(cmd);
}

/* Gather what waits. The number of bytes. */
static size_t vf_nbd_wire_gather(const struct vf_nbd *nbd, struct iovec *iovs, uint32_t *iov_count)
{
	const struct vf_nbd_wire *wire = &nbd->wire;
	size_t skip = wire->front_bytes;
	size_t total = 0;
	uint32_t at = wire->head;

	*iov_count = 0;
	for (uint32_t i = 0; i < wire->count && *iov_count + 2u <= VF_NBD_OUT_IOVS; i++) {
		struct vf_nbd_cmd *cmd = &nbd->cmds[wire->queue[at]];
		const struct iovec parts[2] = {
			{ &cmd->request, sizeof(cmd->request) },
			{ cmd->data, cmd->kind == VF_NBD_WRITE ? cmd->len_bytes : 0 },
		};

		for (uint32_t part = 0; part < 2u; part++) {
			size_t passed = skip < parts[part].iov_len ? skip : parts[part].iov_len;

			skip -= passed;
			if (passed == parts[part].iov_len)
				continue;
			iovs[(*iov_count)++] = (struct iovec){ (uint8_t *)parts[part].iov_base + passed,
							       parts[part].iov_len - passed };
			total += parts[part].iov_len - passed;
		}
		at = at + 1u < nbd->slot_count ? at + 1u : 0;
	}
	return total;
}

/* Take the commands off the queue that n bytes more have gone out of. */
static void vf_nbd_wire_sent(struct vf_nbd *nbd, size_t n)
{
	struct vf_nbd_wire *wire = &nbd->wire;

	n += wire->front_bytes;
	while (wire->count) {
		struct vf_nbd_cmd *cmd = &nbd->cmds[wire->queue[wire->head]];
		size_t whole = sizeof(cmd->request) + (cmd->kind == VF_NBD_WRITE ? cmd->len_bytes : 0);

		if (n < whole)
			break;
		n -= whole;
		cmd->queued = 0;
		wire->head = wire->head + 1u < nbd->slot_count ? wire->head + 1u : 0;
		wire->count--;
	}
	wire->front_bytes = n;
}

void vf_nbd_wire_flush(struct vf_nbd *nbd)
{
	struct vf_nbd_wire *wire = &nbd->wire;
	struct iovec iovs[VF_NBD_OUT_IOVS];

	while (wire->count && !wire->err) {
		uint32_t iov_count;
		size_t total = vf_nbd_wire_gather(nbd, iovs, &iov_count);
		struct msghdr message = { .msg_iov = iovs, .msg_iovlen = iov_count };
		ssize_t n = sendmsg(nbd->link.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (vf_unlikely(n < 0)) {
			if (errno != EAGAIN && errno != EINTR)
				wire->err = errno; /* the next check reports it */
			return;
		}
		vf_nbd_wire_sent(nbd, (size_t)n);
		if ((size_t)n < total)
			return;
	}
}

/* The protocol's numbers are those of Linux. */
static int vf_nbd_errno(uint32_t error)
{
	switch (error) {
	case 0:
	case EPERM:
	case EIO:
	case ENOMEM:
	case EINVAL:
	case ENOSPC:
	case EOVERFLOW:
	case EOPNOTSUPP:
	case ESHUTDOWN:
		return (int)error;
	default:
		return EINVAL;
	}
}

static void vf_nbd_wire_done(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd, int err)
{
	vf_nbd_cmd_disarm(cmd);
	nbd->wire.large_count -= (uint32_t)vf_nbd_is_large(cmd);
	vf_nbd_answer(nbd, cmd, err);
}

/* Parse one reply, whose header is in the buffer. 0, or -1 with text filled in: it is malformed. */
static int vf_nbd_wire_reply(struct vf_nbd *nbd, char *text, size_t text_bytes)
{
	struct vf_nbd_wire *wire = &nbd->wire;
	const uint8_t *header = wire->in + wire->in_at;
	uint32_t magic, error, here, slot;
	uint64_t cookie;
	struct vf_nbd_cmd *cmd;

	memcpy(&magic, header, sizeof(magic));
	memcpy(&error, header + 4, sizeof(error));
	memcpy(&cookie, header + 8, sizeof(cookie));
	if (be32toh(magic) != VF_NBD_REPLY_MAGIC) {
		snprintf(text, text_bytes, "the server's answer begins with 0x%08x, which is no reply", be32toh(magic));
		return -1;
	}
	cookie = be64toh(cookie);
	slot = (uint32_t)(cookie & VF_NBD_SLOT_MASK);
	cmd = &nbd->cmds[slot < nbd->slot_count ? slot : 0];
	/* A request has a cookie from when it is sent on this connection to its one answer, and only while it is in flight. */
	if (cookie >> 16 == 0 || cmd->cookie != cookie || cmd->queued || !cmd->req || !cmd->sent) {
		snprintf(text, text_bytes, "the server replies to a request that was not sent");
		return -1;
	}
	wire->in_at += VF_NBD_REPLY_BYTES;
	if (error || cmd->kind != VF_NBD_READ) {
		vf_nbd_wire_done(nbd, cmd, vf_nbd_errno(be32toh(error)));
		return 0;
	}
	here = wire->in_end - wire->in_at;
	if (here > cmd->len_bytes)
		here = cmd->len_bytes;
	memcpy(cmd->data, wire->in + wire->in_at, here);
	wire->in_at += here;
	if (here == cmd->len_bytes) {
		vf_nbd_wire_done(nbd, cmd, 0);
	} else {
		wire->into = cmd;
		wire->into_at = here;
	}
	return 0;
}

/* Receive once: the rest of a read that has begun into its place, and what follows into the buffer. 1: there may be more.
 * 0: not now. -1 with text filled in. */
static int vf_nbd_wire_receive(struct vf_nbd *nbd, char *text, size_t text_bytes)
{
	struct vf_nbd_wire *wire = &nbd->wire;
	uint32_t rest = wire->into ? wire->into->len_bytes - wire->into_at : 0;
	uint32_t room = wire->large_count ? VF_NBD_IN_SMALL_BYTES : VF_NBD_IN_BYTES - wire->in_end;
	struct iovec iovs[2] = {
		{ rest ? wire->into->data + wire->into_at : NULL, rest },
		{ wire->in + wire->in_end, room },
	};
	struct msghdr message = { .msg_iov = rest ? iovs : iovs + 1, .msg_iovlen = rest ? 2 : 1 };
	ssize_t n = recvmsg(nbd->link.fd, &message, MSG_DONTWAIT);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	if (n < 0) {
		wire->err = errno;
		snprintf(text, text_bytes, "%s", strerror(errno));
		return -1;
	}
	if (n == 0) {
		snprintf(text, text_bytes, "the server has closed it");
		return -1;
	}
	if ((size_t)n < rest) {
		wire->into_at += (uint32_t)n;
	} else {
		wire->in_end += (uint32_t)n - rest;
		if (rest) {
			vf_nbd_wire_done(nbd, wire->into, 0);
			wire->into = NULL;
		}
	}
	return (size_t)n == rest + room;
}

int vf_nbd_wire_look(struct vf_nbd *nbd, char *text, size_t text_bytes)
{
	struct vf_nbd_wire *wire = &nbd->wire;
	int more = 1;

	if (vf_unlikely(wire->count))
		vf_nbd_wire_flush(nbd);
	for (uint32_t i = 0; i < VF_NBD_LOOKS_MAX && more > 0; i++) {
		more = vf_nbd_wire_receive(nbd, text, text_bytes);
		while (!wire->into && wire->in_end - wire->in_at >= VF_NBD_REPLY_BYTES) {
			if (vf_nbd_wire_reply(nbd, text, text_bytes))
				return -1;
		}
		/* Less than a header is left. */
		wire->in_end -= wire->in_at;
		memmove(wire->in, wire->in + wire->in_at, wire->in_end);
		wire->in_at = 0;
	}
	if (more >= 0 && vf_unlikely(wire->err)) {
		snprintf(text, text_bytes, "%s", strerror(wire->err));
		return -1;
	}
	return more < 0 ? -1 : 0;
}
