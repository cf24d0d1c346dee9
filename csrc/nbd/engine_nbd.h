/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine for an export of an NBD server, in the worker's own loop; a thread only connects (nbd_connector.c).
 *
 * A request becomes a sequence of commands, one at a time. If a connection dies before the reply, the command is sent again
 * on the next one, so a server that returns in time is only a pause. engine_nbd.c makes commands of requests, nbd_link.c
 * keeps the connection.
 */
#ifndef VF_ENGINE_NBD_H
#define VF_ENGINE_NBD_H

#include "engine/engine.h"
#include "nbd/nbd_events.h"

struct vf_nbd_config {
	const char *uri;
	uint64_t size_bytes; /* of the device */
	uint32_t block_size_bytes; /* of the device */
	uint8_t read_only; /* the device is */
	uint8_t sole; /* no other process writes to the export, so smaller blocks can be emulated */
	uint64_t timeout_ns; /* 0: none */
	uint64_t reconnect_ns;
	int hold_fd; /* borrowed; -1 for none: nbd_fence.c */
	int notes_fd; /* as that */
	int64_t notes_offset;
};

struct vf_nbd;

/* An engine that is not open yet, or NULL with errno set. */
struct vf_nbd *vf_nbd_create(const struct vf_nbd_config *config);
void vf_nbd_destroy(struct vf_nbd *nbd);

/* The argument of vf_engine_open_plugin(), and the engine's events; both are the engine's own. */
const struct vf_engine_plugin *vf_nbd_plugin(const struct vf_nbd *nbd);
struct vf_nbd_event_ring *vf_nbd_events_of(struct vf_nbd *nbd);

#endif
