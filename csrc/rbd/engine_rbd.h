/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine for an image of Ceph RBD: librbd's asynchronous calls straight on a request's memory.
 */
#ifndef VF_ENGINE_RBD_H
#define VF_ENGINE_RBD_H

#include "engine/engine.h"
#include "rbd/opener.h"

struct vf_rbd {
	struct vf_engine_plugin plugin;
	struct vf_rbd_opener opener;
	double reconnect_s;
	double wait_limit_s; /* of a request, while the image is not open; 0: none of its own */
	uint8_t gone; /* closing took too long: see vf_rbd_opener_stop() */
};

/* NULL and errno. The strings of settings are borrowed. */
struct vf_rbd *vf_rbd_create(const struct vf_rbd_settings *settings, uint64_t device_bytes, double timeout_s,
			     double reconnect_s, int notes_fd, uint32_t notes_offset);

/* Release it; its engine was closed. 0, or -ETIMEDOUT: a thread that cannot be ended still uses it and what it borrows. */
int vf_rbd_destroy(struct vf_rbd *rbd);

#endif
