/* SPDX-License-Identifier: Apache-2.0
 *
 * Events of an engine for the process around it: lines for a log, and sizes. A ring of them and an eventfd.
 */
#ifndef VF_NBD_EVENTS_H
#define VF_NBD_EVENTS_H

#include <stdint.h>

#define VF_NBD_EVENTS_MAX 16u
#define VF_NBD_EVENT_TEXT_BYTES 800u

struct vf_nbd_event {
	uint64_t size_bytes; /* 0: a line for the log */
	char text[VF_NBD_EVENT_TEXT_BYTES];
};

struct vf_nbd_event_ring {
	int fd; /* readable while there is something */
	uint32_t head;
	uint32_t count;
	struct vf_nbd_event items[VF_NBD_EVENTS_MAX];
};

/* 0 or -errno. */
int vf_nbd_events_open(struct vf_nbd_event_ring *ring);
void vf_nbd_events_close(struct vf_nbd_event_ring *ring);

/* An event that does not fit is dropped: the first ones say more. */
void vf_nbd_log(struct vf_nbd_event_ring *ring, const char *format, ...) __attribute__((format(printf, 2, 3)));
void vf_nbd_report_size(struct vf_nbd_event_ring *ring, uint64_t size_bytes);

/* Pop the oldest. 1, or 0 when there is none, which makes the descriptor unreadable. */
int vf_nbd_event_take(struct vf_nbd_event_ring *ring, struct vf_nbd_event *event);

#endif
