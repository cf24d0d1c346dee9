/* SPDX-License-Identifier: Apache-2.0
 *
 * A thread that opens an image for an engine, because librados and librbd block while they connect. It retries until it
 * succeeds, reports failures as events, and then watches the image's size.
 */
#ifndef VF_RBD_OPENER_H
#define VF_RBD_OPENER_H

#include <pthread.h>
#include <stdint.h>

#include "base/barrier.h"
#include "rbd/image.h"

#define VF_RBD_EVENT_MAX 16u

enum vf_rbd_event_kind {
	VF_RBD_EVENT_NONE,
	VF_RBD_EVENT_RETRIES, /* opening failed: step, err; it continues */
	VF_RBD_EVENT_OPENED, /* after RETRIES or GAVE_UP */
	VF_RBD_EVENT_GAVE_UP, /* it could not be opened for reconnect_s: requests get errors until it is open */
	VF_RBD_EVENT_FENCED, /* a client that has died was shut out: err = 0, or why that was not possible */
	VF_RBD_EVENT_SHUT_OUT, /* this client was */
	VF_RBD_EVENT_TIMED_OUT, /* a request had no answer for too long */
	VF_RBD_EVENT_NOTES, /* the file for the next one cannot be written: err */
	VF_RBD_EVENT_RESIZED, /* value: bytes */
};

struct vf_rbd_event {
	enum vf_rbd_event_kind kind;
	enum vf_rbd_step step;
	int err;
	uint64_t value;
};

enum vf_rbd_phase {
	VF_RBD_OPENING,
	VF_RBD_IS_OPEN,
	VF_RBD_CLOSED,
};

struct vf_rbd_opener {
	struct vf_rbd_settings settings;
	struct vf_rbd_image image; /* the thread's, until `phase` says that it is open */
	uint64_t device_bytes; /* the device's size, by the last event */
	int notes_fd; /* borrowed; -1: none. The client that has the image is noted there, for the next worker */
	uint32_t notes_offset;
	int wake_fd; /* an eventfd: completions of the image, and its opening */
	int events_fd; /* an eventfd: readable while there are events */
	uint32_t phase; /* enum vf_rbd_phase */
	uint32_t has_events;
	uint64_t update_handle;
	uint8_t watches;
	uint8_t early_writes; /* known once it is open: vf_rbd_about() */
	uint8_t has_thread;

	pthread_t thread;
	pthread_mutex_t lock; /* of all below */
	pthread_cond_t changed;
	uint8_t stop;
	uint8_t ended; /* the thread does not use this any more */
	uint32_t event_first;
	uint32_t event_count;
	struct vf_rbd_event events[VF_RBD_EVENT_MAX];
};

/* 0 or -errno; on an error nothing is held. The strings of settings are borrowed. */
int vf_rbd_opener_init(struct vf_rbd_opener *opener, const struct vf_rbd_settings *settings, uint64_t device_bytes,
		       int notes_fd, uint32_t notes_offset);

/* Start opening. 0 or -errno. */
int vf_rbd_opener_start(struct vf_rbd_opener *opener);

/* Close the image. 0, or -ETIMEDOUT when the cluster has not let go of it after limit_ms: the thread still uses the opener
 * and what it borrows, for ever perhaps, and all that is left to do is to end the process. */
int vf_rbd_opener_stop(struct vf_rbd_opener *opener, uint32_t limit_ms);

/* Release what init has made; it was stopped. */
void vf_rbd_opener_destroy(struct vf_rbd_opener *opener);

/* Add an event; from any thread. Without room it is dropped, but the last size always stays. */
void vf_rbd_event_put(struct vf_rbd_opener *opener, struct vf_rbd_event event);

/* Pop the oldest: 1, or 0 when there is none. */
int vf_rbd_event_take(struct vf_rbd_opener *opener, struct vf_rbd_event *event);

static inline int vf_rbd_is_open(const struct vf_rbd_opener *opener)
{
	return vf_load_acquire_u32(&opener->phase) == VF_RBD_IS_OPEN; /* pairs with the release of the opening thread */
}

static inline int vf_rbd_has_events(const struct vf_rbd_opener *opener)
{
	return (int)vf_load_relaxed_u32(&opener->has_events);
}

#endif
