/* SPDX-License-Identifier: Apache-2.0 */
#include "nbd/nbd_news.h"

#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <unistd.h>

int vf_nbd_news_open(struct vf_nbd_news_ring *ring)
{
	ring->head = ring->count = 0;
	ring->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return ring->fd < 0 ? -errno : 0;
}

void vf_nbd_news_close(struct vf_nbd_news_ring *ring)
{
	if (ring->fd >= 0)
		close(ring->fd);
	ring->fd = -1;
}

/* The next free place, NULL when there is none. */
static struct vf_nbd_news *vf_nbd_news_place(struct vf_nbd_news_ring *ring)
{
	if (ring->count == VF_NBD_NEWS_MAX)
		return NULL;
	return &ring->items[(ring->head + ring->count) % VF_NBD_NEWS_MAX];
}

static void vf_nbd_news_put(struct vf_nbd_news_ring *ring)
{
	uint64_t one = 1;
	ssize_t written = write(ring->fd, &one, sizeof(one));

	(void)written; /* it fails only when the counter is full: it is readable then */
	ring->count++;
}

void vf_nbd_log(struct vf_nbd_news_ring *ring, const char *format, ...)
{
	struct vf_nbd_news *news = vf_nbd_news_place(ring);
	va_list arguments;

	if (!news)
		return;
	news->size_bytes = 0;
	va_start(arguments, format);
	vsnprintf(news->text, sizeof(news->text), format, arguments);
	va_end(arguments);
	vf_nbd_news_put(ring);
}

void vf_nbd_tell_size(struct vf_nbd_news_ring *ring, uint64_t size_bytes)
{
	struct vf_nbd_news *news = vf_nbd_news_place(ring);

	if (!news)
		return;
	news->size_bytes = size_bytes;
	news->text[0] = '\0';
	vf_nbd_news_put(ring);
}

int vf_nbd_news_take(struct vf_nbd_news_ring *ring, struct vf_nbd_news *news)
{
	uint64_t count;

	if (ring->count == 0) {
		ssize_t got = read(ring->fd, &count, sizeof(count));

		(void)got; /* it fails when it is unreadable already */
		return 0;
	}
	*news = ring->items[ring->head];
	ring->head = (ring->head + 1u) % VF_NBD_NEWS_MAX;
	ring->count--;
	return 1;
}
