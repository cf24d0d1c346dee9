/* SPDX-License-Identifier: Apache-2.0 */
#include "nbd/nbd_events.h"

#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <unistd.h>

int vf_nbd_events_open(struct vf_nbd_event_ring *ring)
{
	ring->head = ring->count = 0;
	ring->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return ring->fd < 0 ? -errno : 0;
}

void vf_nbd_events_close(struct vf_nbd_event_ring *ring)
{
	if (ring->fd >= 0)
		close(ring->fd);
	ring->fd = -1;
}

/* The next free place, NULL when there is none. */
static struct vf_nbd_event *vf_nbd_event_slot(struct vf_nbd_event_ring *ring)
{
	if (ring->count == VF_NBD_EVENTS_MAX)
		return NULL;
	return &ring->items[(ring->head + ring->count) % VF_NBD_EVENTS_MAX];
}

static void vf_nbd_event_publish(struct vf_nbd_event_ring *ring)
{
	uint64_t one = 1;
	ssize_t written = write(ring->fd, &one, sizeof(one));

	(void)written; /* it fails only when the counter is full: it is readable then */
	ring->count++;
}

void vf_nbd_log(struct vf_nbd_event_ring *ring, const char *format, ...)
{
	struct vf_nbd_event *event = vf_nbd_event_slot(ring);
	va_list arguments;

	if (!event)
		return;
	event->size_bytes = 0;
	va_start(arguments, format);
	vsnprintf(event->text, sizeof(event->text), format, arguments);
	va_end(arguments);
	vf_nbd_event_publish(ring);
}

void vf_nbd_report_size(struct vf_nbd_event_ring *ring, uint64_t size_bytes)
{
	struct vf_nbd_event *event = vf_nbd_event_slot(ring);

	if (!event)
		return;
	event->size_bytes = size_bytes;
	event->text[0] = '\0';
	vf_nbd_event_publish(ring);
}

int vf_nbd_event_take(struct vf_nbd_event_ring *ring, struct vf_nbd_event *event)
{
	uint64_t count;

	if (ring->count == 0) {
		ssize_t got = read(ring->fd, &count, sizeof(count));

		(void)got; /* it fails when it is unreadable already */
		return 0;
	}
	*event = ring->items[ring->head];
	ring->head = (ring->head + 1u) % VF_NBD_EVENTS_MAX;
	ring->count--;
	return 1;
}
