/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine for an export of an NBD server, by libnbd's asynchronous calls in the worker's own loop: no thread.
 *
 * A request becomes a row of commands, one at a time. A command that has no answer when its connection dies is sent
 * again on the next one, so that a server which comes back in time is a pause. engine_nbd.c makes commands of requests,
 * nbd_link.c keeps the connection.
 */
#ifndef VF_ENGINE_NBD_H
#define VF_ENGINE_NBD_H

#include "clock.h"
#include "engine.h"
#include "nbd_export.h"
#include "nbd_news.h"

#define VF_NBD_URI_BYTES 4096u
#define VF_NBD_BOUNCE_BYTES (256u << 10)
/* A segment of this size goes by itself, without a copy. */
#define VF_NBD_DIRECT_MIN_BYTES (64u << 10)
/* Of one trim or zero command: its 32 bits take more, but progress should be seen. */
#define VF_NBD_RANGE_MAX_BYTES (1u << 30)
/* A command that so many connections have died with is not the victim, it is what kills them. */
#define VF_NBD_LOSSES_MAX 8u

#define VF_NBD_MS 1000000ull
#define VF_NBD_PAUSE_MIN_NS (50u * VF_NBD_MS) /* before the next connection; longer from one in vain to the next */

enum vf_nbd_kind {
	VF_NBD_READ,
	VF_NBD_WRITE,
	VF_NBD_FLUSH,
	VF_NBD_TRIM,
	VF_NBD_ZERO,
};

struct vf_nbd;

/* As it goes over the socket; all in network order. */
struct vf_nbd_request {
	uint32_t magic;
	uint16_t flags;
	uint16_t type;
	uint64_t cookie;
	uint64_t offset_bytes;
	uint32_t len_bytes;
} __attribute__((packed));

/* What a request has in flight, or waits to send: at the index of its slot. */
struct vf_nbd_cmd {
	struct vf_nbd *nbd;
	struct vf_req *req; /* NULL: none */
	uint8_t *data;
	uint8_t *bounce; /* NULL, or the buffer that `data` is */
	uint64_t offset_bytes;
	uint64_t since_ns; /* when it was given to the connection that it is on */
	uint64_t cookie; /* 0: nothing is asked */
	uint32_t len_bytes;
	uint32_t losses;
	int32_t err; /* of the answer: 0 or a positive errno */
	uint8_t kind; /* enum vf_nbd_kind */
	uint8_t flags; /* LIBNBD_CMD_FLAG_*, which are those of the protocol */
	uint8_t sent;
	uint8_t queued; /* it waits to go out, or has begun to */
	uint8_t behind; /* all data is written: what is left is the flush behind it */
	struct vf_nbd_request request;
};

enum vf_nbd_link_state {
	VF_NBD_DOWN,
	VF_NBD_ENDING, /* the server may still work on what an earlier connection gave it: wait for the end of that */
	VF_NBD_CONNECTING,
	VF_NBD_UP,
};

struct vf_nbd_link {
	struct nbd_handle *handle; /* while connecting and up */
	int fd; /* a duplicate of the socket, or -1: it outlives the handle */
	enum vf_nbd_link_state state;
	uint8_t leaving; /* the server has said that it shuts down */
	uint8_t outgrown; /* the device has become larger than the export was when this connection was made */
	uint8_t was_up; /* there was one before */
	uint8_t has_served; /* the server has answered on this connection, or on the last */
	uint8_t gave_up; /* lost for too long: requests get errors */
	uint32_t flap_count; /* connections in a row that died at once */
	uint64_t up_ns; /* when it was made */
	uint64_t next_ns; /* down: try again then */
	uint64_t end_ns; /* connecting and ending: wait no longer than that */
	uint64_t pause_ns; /* before the next attempt */
	uint64_t lost_ns; /* since when there is no connection; 0 = there is */
	uint64_t scan_ns; /* when to look for requests without an answer */
	struct vf_nbd_export export;
	char refused[VF_NBD_TEXT_BYTES]; /* what the log says of the attempts of this outage */
};

/* The transmission of a connection without TLS: nbd_wire.c. */
struct vf_nbd_wire {
	uint8_t on;
	int err; /* errno of what failed where nobody was told */
	uint32_t seq; /* of cookies */
	uint16_t *queue; /* slots whose requests go out next */
	uint32_t head;
	uint32_t count;
	size_t front_bytes; /* of the first one that are out */
	uint8_t *in; /* received and not looked at: [in_at, in_end) */
	uint32_t in_at;
	uint32_t in_end;
	struct vf_nbd_cmd *into; /* whose data comes now, into_at bytes of it are there */
	uint32_t into_at;
	uint32_t large_count; /* reads without an answer whose data is not worth a copy */
};

struct vf_nbd_config {
	const char *uri;
	uint64_t size_bytes; /* of the device */
	uint32_t block_size_bytes; /* of the device */
	uint8_t read_only; /* the device is */
	uint64_t timeout_ns; /* 0: none */
	uint64_t reconnect_ns;
	int hold_fd; /* borrowed; -1 for none: nbd_hold.c */
};

struct vf_nbd {
	struct vf_nbd_config config;
	char uri[VF_NBD_URI_BYTES];
	struct vf_nbd_news_ring news;
	struct vf_engine_plugin plugin;
	/* While the engine is open: */
	struct vf_engine *engine;
	struct vf_nbd_link link;
	struct vf_nbd_wire wire;
	uint64_t known_size_bytes; /* of the export, that the device has been told of */
	uint32_t slot_count;
	struct vf_nbd_cmd *cmds;
	uint16_t *answered; /* slots whose commands have an answer that has not been looked at */
	uint32_t answered_head;
	uint32_t answered_count;
	struct vf_req **done;
	uint32_t done_head;
	uint32_t done_count;
	uint8_t *bounce; /* a buffer a slot, and one of zeroes */
	uint16_t *bounce_free;
	uint32_t bounce_free_count;
};

/* Make one; its engine is in ->plugin. NULL with errno set. */
struct vf_nbd *vf_nbd_create(const struct vf_nbd_config *config);
void vf_nbd_destroy(struct vf_nbd *nbd);

/* engine_nbd.c, for nbd_link.c */

/* Give a command to the connection, which is up; it may be finished at once, by an error or as there is nothing to do. */
void vf_nbd_start(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd);
/* Note an answer, 0 or a positive errno; nothing else happens before vf_nbd_digest(). */
void vf_nbd_answer(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd, int err);
/* Look at the answers that have come. */
void vf_nbd_digest(struct vf_nbd *nbd);
/* End a request: 0 or -errno. */
void vf_nbd_finish(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd, int result);
/* Take a command that was sent back, to be sent again. */
void vf_nbd_unsend(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd);

/* nbd_link.c, for engine_nbd.c */

void vf_nbd_link_open(struct vf_nbd *nbd);
void vf_nbd_link_close(struct vf_nbd *nbd);
/* Do what can be done without waiting: one look where there is nothing. */
void vf_nbd_link_pump(struct vf_nbd *nbd);
/* Hand a command over; its answer comes by vf_nbd_digest(). */
void vf_nbd_link_send(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd);
/* What to wait for: a descriptor, or -1, with its events; and until when at the latest, on the monotonic clock. */
int vf_nbd_link_wants(const struct vf_nbd *nbd, short *events, uint64_t *until_ns);


/* nbd_tls.c */

/* Hand a command to libnbd. */
void vf_nbd_tls_send(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd);
/* Take what has come, without waiting. 0, or -1 with text and err (an errno or 0) filled in: the connection is of no use. */
int vf_nbd_tls_look(struct vf_nbd *nbd, char *text, size_t text_bytes, int *err);

/* nbd_hold.c */

/* Leave a socket for the worker to come after this one, in place of what was left before; -1 leaves nothing. */
void vf_nbd_hold(int hold_fd, int fd);
/* Take what an earlier worker has left: a descriptor, now owned, or -1. */
int vf_nbd_hold_take(int hold_fd);

/* nbd_wire.c */

/* The buffers: 0 or -errno. */
int vf_nbd_wire_open(struct vf_nbd *nbd);
void vf_nbd_wire_close(struct vf_nbd *nbd);
/* Begin on a fresh connection, end with it, and say goodbye before. */
void vf_nbd_wire_start(struct vf_nbd *nbd);
void vf_nbd_wire_stop(struct vf_nbd *nbd);
void vf_nbd_wire_leave(struct vf_nbd *nbd);
/* Have a command go out with the next flush. */
void vf_nbd_wire_put(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd);
void vf_nbd_wire_flush(struct vf_nbd *nbd);
/* Take what has come, without waiting. 0, or -1 with text filled in: the connection is of no use any more. */
int vf_nbd_wire_look(struct vf_nbd *nbd, char *text, size_t text_bytes);

#endif
