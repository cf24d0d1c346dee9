/* SPDX-License-Identifier: Apache-2.0
 *
 * A relay is the only process that has a store open, if several may not. It has the store's engine, and the workers of all
 * queues send it their requests. Data goes through memory that a worker shares with the relay, a chunk for each of its slots.
 * Requests and answers are packets of a Unix socket (SOCK_SEQPACKET), many in one. The supervisor makes a socket and a memory
 * for each queue, so a worker can neither reach those of another queue nor choose what the relay maps.
 *
 * When a worker ends, the relay finishes its requests before it serves the next worker of that queue, so no old request can
 * overtake a replayed one. When a relay ends, the workers wait for the next one and send it all their requests again.
 */
#ifndef VF_RELAY_H
#define VF_RELAY_H

#include "engine/engine.h"

#define VF_RELAY_MAGIC 0x564C5246u
#define VF_RELAY_CHUNK_BYTES (128u << 10) /* of data that one request moves at a time; larger ones go piece by piece */
#define VF_RELAY_BATCH_MAX 64u
#define VF_RELAY_QUEUE_MAX 64u

#define VF_RELAY_F_UNMAP 1u
#define VF_RELAY_F_DURABLE 2u /* a write must be durable when it is completed */
#define VF_RELAY_F_REPLAY 4u /* an earlier relay may have had it */
#define VF_RELAY_F_ALL (VF_RELAY_F_UNMAP | VF_RELAY_F_DURABLE | VF_RELAY_F_REPLAY)

/* The first packet. */
struct vf_relay_hello {
	uint32_t magic;
	uint32_t queue;
	uint32_t slot_count;
};

/* The answer to it, after all requests of the previous worker have ended. */
struct vf_relay_ready {
	uint32_t magic;
};

/* The connection between the two sides of a queue. */
struct vf_relay_place {
	int listen_fd; /* of the relay */
	int memory_fd; /* of both: slot_count chunks, which cannot shrink (F_SEAL_SHRINK) */
};

/* Later ones have up to VF_RELAY_BATCH_MAX of these. */
struct vf_relay_request {
	uint64_t offset_bytes;
	uint64_t len_bytes;
	uint16_t slot;
	uint8_t op; /* enum vf_op */
	uint8_t flags;
	uint32_t reserved;
};

struct vf_relay_answer {
	uint32_t slot;
	int32_t result; /* 0 or -errno */
};

/* The engine of a worker; its context is a struct vf_relay_address. */
extern const struct vf_engine_ops vf_engine_relay;

struct vf_relay_address {
	char path[108]; /* of the relay's socket, terminated */
	uint32_t queue;
	int memory_fd; /* borrowed */
};

struct vf_relay_server;

/* The reason why vf_relay_serve() returned. */
enum {
	VF_RELAY_EVENTS = 1, /* of the engine */
	VF_RELAY_WOKEN, /* wake_fd is readable */
};

/* A relay of queue_count queues with slot_count slots each, over an engine from outside. The descriptors in place, one a
 * queue, are borrowed. NULL with errno set; EPROTO as vf_engine_open_plugin(). */
struct vf_relay_server *vf_relay_open(const struct vf_engine_plugin *plugin, const struct vf_store *store,
				      const struct vf_relay_place *place, uint32_t queue_count, uint32_t slot_count,
				      int read_only);

/* Serve until there is something for the caller. */
int vf_relay_serve(struct vf_relay_server *server, int wake_fd);

/* Requests of workers are dropped: they get no answers. */
void vf_relay_close(struct vf_relay_server *server);

#endif
