/* SPDX-License-Identifier: Apache-2.0
 *
 * Shared by the files of the NBD engine: its state, and for each file the functions that others call. Private to csrc/nbd.
 */
#ifndef VF_NBD_INTERNAL_H
#define VF_NBD_INTERNAL_H

#include "base/clock.h"
#include "nbd/engine_nbd.h"
#include "nbd/nbd_export.h"

#define VF_NBD_URI_BYTES 4096u
#define VF_NBD_BOUNCE_BYTES (256u << 10)
/* A segment of this size is sent by itself, without a copy. */
#define VF_NBD_DIRECT_MIN_BYTES (64u << 10)
/* Of one trim or zero command: its 32 bits allow more, but progress should be visible. */
#define VF_NBD_RANGE_MAX_BYTES (1u << 30)
/* If so many connections have died with a command in flight, the command kills them, and is not a victim. */
#define VF_NBD_LOSSES_MAX 8u

#define VF_NBD_MS 1000000ull
#define VF_NBD_PAUSE_MIN_NS (50u * VF_NBD_MS) /* pause before the next connection; it grows with each failure */

enum vf_nbd_kind {
	VF_NBD_READ,
	VF_NBD_WRITE,
	VF_NBD_FLUSH,
	VF_NBD_TRIM,
	VF_NBD_ZERO,
};

/* The fate of a request that waits to be sent: nbd_fence.c. */
enum vf_nbd_fate {
	VF_NBD_FREE, /* it is sent again */
	VF_NBD_DOOMED, /* it had no reply for too long: it fails once the server has ended the connection */
	VF_NBD_WITHHELD, /* it is in doubt: it fails when its time is over */
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

/* The command of a request in flight, or waiting to be sent: at the index of its slot. */
struct vf_nbd_cmd {
	struct vf_nbd *nbd;
	struct vf_req *req; /* NULL: none */
	uint8_t *data;
	uint8_t *bounce; /* NULL, or the buffer that `data` is */
	uint64_t offset_bytes;
	uint64_t since_ns; /* when it was passed to its current connection */
	uint64_t cookie; /* 0: nothing is asked on the connection that there is */
	uint32_t len_bytes;
	uint32_t skip_bytes; /* offset in the buffer of the requested bytes */
	uint32_t part_bytes; /* requested bytes of this command */
	uint32_t losses;
	int32_t err; /* of the answer: 0 or a positive errno */
	uint8_t kind; /* enum vf_nbd_kind */
	uint8_t flags; /* LIBNBD_CMD_FLAG_*, which are those of the protocol */
	uint8_t sent;
	uint8_t queued; /* it waits to go out, or has begun to */
	uint8_t fate; /* enum vf_nbd_fate */
	uint8_t is_old; /* it modifies, and was sent on a connection whose end has not been seen */
	uint8_t is_fetch; /* of a block that is changed and written back: nbd_blocks.c */
	uint8_t listed; /* among the requests that change blocks */
	uint8_t waits; /* for an earlier one of these */
	uint8_t behind; /* all data is written: what is left is the flush after it */
	struct vf_nbd_cmd *earlier, *later; /* listed */
	struct vf_nbd_request request;
};

enum vf_nbd_link_state {
	VF_NBD_DOWN,
	VF_NBD_ENDING, /* the server may still process commands of an earlier connection: wait for its end, however long */
	VF_NBD_CONNECTING,
	VF_NBD_UP,
};

struct vf_nbd_attempt;

struct vf_nbd_link {
	struct vf_nbd_attempt *attempt; /* while connecting */
	struct nbd_handle *handle; /* while up, under TLS */
	int fd; /* a duplicate of the socket, or -1: it outlives the handle */
	enum vf_nbd_link_state state;
	uint8_t leaving; /* the server has announced that it shuts down */
	uint8_t outgrown; /* the device has become larger than the export was when this connection was made */
	uint8_t was_up; /* there was one before */
	uint8_t has_served; /* the server has answered on this connection, or on the last */
	uint8_t gave_up; /* lost for too long: requests get errors */
	uint32_t flap_count; /* connections in a row that died at once */
	uint64_t up_ns; /* when it was made */
	uint64_t next_ns; /* down: try again then */
	uint64_t end_ns; /* ending: when to log that; 0: it is logged */
	uint64_t pause_ns; /* before the next attempt */
	uint64_t lost_ns; /* since when there is no connection; 0 = there is */
	uint8_t doubt; /* a server may have writes of earlier connections, and no end will be seen */
	uint8_t has_new; /* since then a request was submitted that no previous worker can have sent */
	uint32_t withheld_count; /* requests whose fate is not VF_NBD_FREE */
	uint64_t doubt_ns; /* in doubt: when those that are withheld fail */
	uint64_t scan_ns; /* when to look for requests without an answer */
	struct vf_nbd_export export;
	char lost_text[VF_NBD_TEXT_BYTES]; /* why the last connection was lost */
	char refused[VF_NBD_TEXT_BYTES]; /* the last logged reason of failed attempts in this outage */
};

/* The transmission of a connection without TLS: nbd_wire.c. */
struct vf_nbd_wire {
	uint8_t on;
	int err; /* errno of a failure that is not reported yet */
	uint64_t key[2]; /* of cookies: random, of this connection */
	uint64_t seq; /* of cookies */
	uint16_t *queue; /* slots whose requests go out next */
	uint32_t head;
	uint32_t count;
	size_t front_bytes; /* of the first one that are out */
	uint8_t *in; /* received and not parsed: [in_at, in_end) */
	uint32_t in_at;
	uint32_t in_end;
	struct vf_nbd_cmd *into; /* the read whose data comes now; into_at bytes have come */
	uint32_t into_at;
	uint32_t large_count; /* unanswered reads that are too large to copy */
};

/* Detach this command from any reply: its memory may be the driver's again. */
static inline void vf_nbd_cmd_disarm(struct vf_nbd_cmd *cmd)
{
	cmd->cookie = 0;
	cmd->data = NULL;
	cmd->queued = 0;
}

struct vf_nbd {
	struct vf_nbd_config config;
	char uri[VF_NBD_URI_BYTES];
	struct vf_nbd_event_ring events;
	struct vf_engine_plugin plugin;
	/* While the engine is open: */
	struct vf_engine *engine;
	struct vf_nbd_link link;
	struct vf_nbd_wire wire;
	uint64_t known_size_bytes; /* of the export, that the device has been told of */
	uint32_t slot_count;
	struct vf_nbd_cmd *cmds;
	uint16_t *answered; /* slots whose commands have a reply that is not processed */
	uint32_t answered_head;
	uint32_t answered_count;
	struct vf_req **done;
	uint32_t done_head;
	uint32_t done_count;
	uint8_t *bounce; /* a buffer a slot, and one of zeroes */
	uint16_t *bounce_free;
	uint32_t bounce_free_count;
	struct vf_nbd_cmd *first, *last; /* requests that change blocks, in the order of their coming: nbd_blocks.c */
	uint8_t is_due; /* one of them has ended: others may continue */
};

/* engine_nbd.c, for nbd_link.c */

/* Pass a command to the connection, which is up. It may finish at once, by an error or because there is nothing to do. */
void vf_nbd_start(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd);
/* Note an answer, 0 or a positive errno; nothing else happens before vf_nbd_digest(). */
void vf_nbd_answer(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd, int err);
/* Process the replies that have come. */
void vf_nbd_digest(struct vf_nbd *nbd);
/* End a request: 0 or -errno. */
void vf_nbd_finish(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd, int result);
/* Reset a command that was sent, so that it is sent again. */
void vf_nbd_unsend(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd);

/* engine_nbd.c, for nbd_blocks.c */

/* Pass a ready command to the connection. */
void vf_nbd_send(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd);
/* Copy between a buffer and the segments from the request's cursor on, which stays. */
void vf_nbd_copy(struct vf_nbd_cmd *cmd, int to_segments);
void vf_nbd_take_bounce(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd);
/* The flag of modifying commands. */
uint8_t vf_nbd_fua(const struct vf_nbd *nbd);

/* nbd_blocks.c */

enum vf_nbd_turn {
	VF_NBD_GO,
	VF_NBD_WAIT, /* vf_nbd_blocks_run() starts it */
	VF_NBD_NOTHING, /* there is nothing to be done */
};

/* Whether the export takes no blocks as small as the device's. */
int vf_nbd_emulates(const struct vf_nbd *nbd);
/* Those below are for such an export. */

/* Start or continue a request. */
enum vf_nbd_turn vf_nbd_blocks_enter(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd);
/* Note the end of a request. */
void vf_nbd_blocks_leave(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd);
/* Start requests that need not wait any longer. */
void vf_nbd_blocks_run(struct vf_nbd *nbd);
/* On a new connection, before anything is started. */
void vf_nbd_blocks_reset(struct vf_nbd *nbd);
/* How many bytes of whole blocks there are at a request's cursor; 0: the command is made, for a part of one. */
uint64_t vf_nbd_blocks_aim(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd);
/* The block has been fetched: change it and write it back. */
void vf_nbd_blocks_put(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd);

/* nbd_link.c, for engine_nbd.c */

void vf_nbd_link_open(struct vf_nbd *nbd);
void vf_nbd_link_close(struct vf_nbd *nbd);
/* Make progress without waiting: one check if there is nothing to do. */
void vf_nbd_link_pump(struct vf_nbd *nbd);
/* Send a command; its reply comes through vf_nbd_digest(). */
void vf_nbd_link_send(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd);
/* The events to wait for: a descriptor, or -1, with its events; and the latest time, on the monotonic clock. */
int vf_nbd_link_wants(const struct vf_nbd *nbd, short *events, uint64_t *until_ns);

/* nbd_tls.c */

/* Pass a command to libnbd. */
void vf_nbd_tls_send(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd);
/* Receive replies, without waiting. 0, or -1 with text and err (an errno or 0) filled in: the connection is unusable. */
int vf_nbd_tls_look(struct vf_nbd *nbd, char *text, size_t text_bytes, int *err);

/* nbd_connector.c */

/* Begin to connect, in a thread. NULL with errno. */
struct vf_nbd_attempt *vf_nbd_attempt_begin(const char *uri);
/* Readable once it is done. */
int vf_nbd_attempt_fd(const struct vf_nbd_attempt *attempt);
int vf_nbd_attempt_is_done(const struct vf_nbd_attempt *attempt);
/* End one that is done: a handle that is ready, now owned, or NULL with text filled in. */
struct nbd_handle *vf_nbd_attempt_end(struct vf_nbd_attempt *attempt, char *text, size_t text_bytes);
/* Wait for it no more; it cleans up by itself. NULL: nothing. */
void vf_nbd_attempt_leave(struct vf_nbd_attempt *attempt);

/* nbd_fence.c */

/* Check the note of earlier workers: whether to wait for the end of a connection, which is in link.fd then. */
int vf_nbd_fence_open(struct vf_nbd *nbd, uint64_t now_ns);
/* Keep the connection in link.fd open beyond our death; call it before anything is sent. 0, or -1: impossible. */
int vf_nbd_fence_begin(struct vf_nbd *nbd);
/* Note that the server has none of its commands any more. */
void vf_nbd_fence_end(struct vf_nbd *nbd);
/* Note that it is over, and that it is unknown whether the server still has commands of it. */
void vf_nbd_fence_doubt(struct vf_nbd *nbd, uint64_t now_ns);
/* While in doubt: check whether its time is over. */
void vf_nbd_fence_look(struct vf_nbd *nbd, uint64_t now_ns);
/* Whether a connection that dies of this errno (0: of none) is over for the server, or its socket still tells. */
int vf_nbd_ends_in_order(int err);
/* Take the error of a socket, 0 for none; is_closed: whether it is over for us and no end was heard of, if it is TCP. */
int vf_nbd_socket_err(int fd, int *is_closed);
void vf_nbd_withhold(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd, enum vf_nbd_fate fate);
/* Fail the requests of that fate. */
void vf_nbd_fence_fail(struct vf_nbd *nbd, enum vf_nbd_fate fate);

/* nbd_wire.c */

/* The buffers: 0 or -errno. */
int vf_nbd_wire_open(struct vf_nbd *nbd);
void vf_nbd_wire_close(struct vf_nbd *nbd);
/* Begin on a fresh connection, end with it, and say goodbye before. */
int vf_nbd_wire_start(struct vf_nbd *nbd); /* 0, or -1: there are no random numbers */
void vf_nbd_wire_stop(struct vf_nbd *nbd);
void vf_nbd_wire_leave(struct vf_nbd *nbd);
/* Queue a command for the next flush. */
void vf_nbd_wire_put(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd);
void vf_nbd_wire_flush(struct vf_nbd *nbd);
/* Receive replies, without waiting. 0, or -1 with text filled in: the connection is unusable. */
int vf_nbd_wire_look(struct vf_nbd *nbd, char *text, size_t text_bytes);

#endif
