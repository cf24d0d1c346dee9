/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "rbd/opener.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define VF_RBD_PAUSE_MIN_MS 250u
#define VF_RBD_PAUSE_MAX_MS 4000u

static void vf_rbd_raise(int fd)
{
	uint64_t one = 1;
	ssize_t written = write(fd, &one, sizeof(one));

	(void)written; /* it fails only when the counter is full: it is readable then */
}

/* The size is the one event that must not get lost, and only its newest value counts. */
static struct vf_rbd_event *vf_rbd_event_place(struct vf_rbd_opener *opener, enum vf_rbd_event_kind kind)
{
	for (uint32_t i = 0; i < opener->event_count && kind == VF_RBD_EVENT_RESIZED; i++) {
		struct vf_rbd_event *event = &opener->events[(opener->event_first + i) % VF_RBD_EVENT_MAX];

		if (event->kind == kind)
			return event;
	}
	/* One entry is reserved for the size. */
	if (opener->event_count >= VF_RBD_EVENT_MAX - (kind != VF_RBD_EVENT_RESIZED))
		return NULL;
	return &opener->events[(opener->event_first + opener->event_count++) % VF_RBD_EVENT_MAX];
}

void vf_rbd_event_put(struct vf_rbd_opener *opener, struct vf_rbd_event event)
{
	struct vf_rbd_event *place;

	pthread_mutex_lock(&opener->lock);
	place = vf_rbd_event_place(opener, event.kind);
	if (place)
		*place = event;
	vf_store_relaxed_u32(&opener->has_events, 1);
	vf_rbd_raise(opener->events_fd);
	pthread_mutex_unlock(&opener->lock);
	vf_rbd_raise(opener->wake_fd);
}

int vf_rbd_event_take(struct vf_rbd_opener *opener, struct vf_rbd_event *event)
{
	uint64_t count;
	int any;

	pthread_mutex_lock(&opener->lock);
	any = opener->event_count != 0;
	if (any) {
		*event = opener->events[opener->event_first];
		opener->event_first = (opener->event_first + 1u) % VF_RBD_EVENT_MAX;
		opener->event_count--;
	} else {
		ssize_t got = read(opener->events_fd, &count, sizeof(count));

		(void)got; /* it is not readable now either way */
		vf_store_relaxed_u32(&opener->has_events, 0);
	}
	pthread_mutex_unlock(&opener->lock);
	return any;
}

static void vf_rbd_report_size(struct vf_rbd_opener *opener)
{
	uint64_t size_bytes;

	if (rbd_get_size(opener->image.image, &size_bytes))
		return; /* the image or the cluster is going: the next operation reports that */
	pthread_mutex_lock(&opener->lock);
	if (size_bytes == opener->device_bytes) {
		pthread_mutex_unlock(&opener->lock);
		return;
	}
	opener->device_bytes = size_bytes;
	pthread_mutex_unlock(&opener->lock);
	vf_rbd_event_put(opener, (struct vf_rbd_event){ .kind = VF_RBD_EVENT_RESIZED, .value = size_bytes });
}

/* In a thread of librbd's: the image has changed. */
static void vf_rbd_on_update(void *context)
{
	vf_rbd_report_size(context);
}

/* Read the note of the previous client. "": it has ended cleanly, or there was none. */
static void vf_rbd_notes_read(const struct vf_rbd_opener *opener, char *client, size_t size)
{
	ssize_t got = opener->notes_fd < 0 ? 0 : pread(opener->notes_fd, client, size - 1, opener->notes_offset);

	client[got > 0 ? got : 0] = '\0';
}

static int vf_rbd_notes_write(const struct vf_rbd_opener *opener, const char *client)
{
	size_t len = strlen(client) + 1;
	ssize_t put = opener->notes_fd < 0 ? (ssize_t)len : pwrite(opener->notes_fd, client, len, opener->notes_offset);

	if (put < 0)
		return -errno;
	return put == (ssize_t)len ? 0 : -ENOSPC;
}

static int vf_rbd_opener_try(struct vf_rbd_opener *opener)
{
	char client[VF_RBD_CLIENT_MAX];
	char before[VF_RBD_CLIENT_MAX];
	struct vf_rbd_about about;
	int fenced;
	int err;

	vf_rbd_notes_read(opener, before, sizeof(before));
	err = vf_rbd_image_open(&opener->image, &opener->settings, before, &fenced);
	if (err)
		return err;
	if (fenced != VF_RBD_NOBODY)
		vf_rbd_event_put(opener, (struct vf_rbd_event){ .kind = VF_RBD_EVENT_FENCED, .err = fenced });
	/* Before our first request: the next worker can blocklist us. */
	err = vf_rbd_client(&opener->image, client);
	if (err == 0)
		err = vf_rbd_notes_write(opener, client);
	if (err)
		vf_rbd_event_put(opener, (struct vf_rbd_event){ .kind = VF_RBD_EVENT_NOTES, .err = err });
	err = vf_rbd_about(&opener->image, &about);
	if (err)
		return err;
	opener->early_writes = about.early_writes && !opener->settings.early_writes;
	err = rbd_set_image_notification(opener->image.image, opener->wake_fd, EVENT_TYPE_EVENTFD);
	if (err)
		return err;
	if (!*opener->settings.snap) {
		opener->watches = rbd_update_watch(opener->image.image, &opener->update_handle, vf_rbd_on_update, opener) == 0;
		vf_rbd_report_size(opener);
	}
	return 0;
}

/* Wait for the end of a pause, or for stop, with the lock held. Returns whether to stop. */
static int vf_rbd_opener_pause(struct vf_rbd_opener *opener, uint32_t pause_ms)
{
	struct timespec until;
	int err = 0;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += pause_ms / 1000u;
	until.tv_nsec += (long)(pause_ms % 1000u) * 1000000l;
	if (until.tv_nsec >= 1000000000l) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000l;
	}
	while (!opener->stop && err == 0)
		err = pthread_cond_timedwait(&opener->changed, &opener->lock, &until);
	return opener->stop;
}

static int vf_rbd_opener_stopped(struct vf_rbd_opener *opener)
{
	int stop;

	pthread_mutex_lock(&opener->lock);
	stop = opener->stop;
	pthread_mutex_unlock(&opener->lock);
	return stop;
}

/* Open the image, however long that takes. 0, or -ECANCELED: stopped. */
static int vf_rbd_opener_open(struct vf_rbd_opener *opener)
{
	enum vf_rbd_step told_step = VF_RBD_OPEN;
	uint32_t pause_ms = VF_RBD_PAUSE_MIN_MS;
	int told_err = 0;
	int stop = 0;

	while (!stop) {
		int err = vf_rbd_opener_try(opener);
		enum vf_rbd_step step = opener->image.reached;

		if (err == 0) {
			vf_store_release_u32(&opener->phase, VF_RBD_IS_OPEN); /* pairs with the acquire of vf_rbd_is_open() */
			if (told_err)
				vf_rbd_event_put(opener, (struct vf_rbd_event){ .kind = VF_RBD_EVENT_OPENED });
			vf_rbd_raise(opener->wake_fd);
			return 0;
		}
		vf_rbd_image_close(&opener->image);
		if (vf_rbd_opener_stopped(opener))
			break;
		if (err != told_err || step != told_step)
			vf_rbd_event_put(opener, (struct vf_rbd_event){ .kind = VF_RBD_EVENT_RETRIES, .step = step, .err = err });
		told_err = err;
		told_step = step;
		pthread_mutex_lock(&opener->lock);
		stop = vf_rbd_opener_pause(opener, pause_ms);
		pthread_mutex_unlock(&opener->lock);
		pause_ms = pause_ms * 2u < VF_RBD_PAUSE_MAX_MS ? pause_ms * 2u : VF_RBD_PAUSE_MAX_MS;
	}
	return -ECANCELED;
}

/* After a clean close there is nothing to blocklist. */
static void vf_rbd_opener_close(struct vf_rbd_opener *opener)
{
	vf_store_release_u32(&opener->phase, VF_RBD_CLOSED); /* pairs with the acquire of vf_rbd_is_open() */
	if (opener->watches)
		rbd_update_unwatch(opener->image.image, opener->update_handle);
	vf_rbd_image_close(&opener->image);
	vf_rbd_notes_write(opener, "");
}

/* The worker is pinned to one CPU, and new threads inherit that. But librbd's threads do most of the work, so they may use all
 * CPUs of this process. */
static void vf_rbd_opener_untie(void)
{
	cpu_set_t all;

	memset(&all, 0xff, sizeof(all));
	sched_setaffinity(0, sizeof(all), &all);
}

static void *vf_rbd_opener_run(void *context)
{
	struct vf_rbd_opener *opener = context;

	vf_rbd_opener_untie();
	if (vf_rbd_opener_open(opener) == 0) {
		pthread_mutex_lock(&opener->lock);
		while (!opener->stop)
			pthread_cond_wait(&opener->changed, &opener->lock);
		pthread_mutex_unlock(&opener->lock);
		vf_rbd_opener_close(opener);
	}
	pthread_mutex_lock(&opener->lock);
	opener->ended = 1;
	pthread_cond_broadcast(&opener->changed);
	pthread_mutex_unlock(&opener->lock);
	return NULL;
}

static int vf_rbd_opener_primitives(struct vf_rbd_opener *opener)
{
	pthread_condattr_t monotonic;
	int err = pthread_mutex_init(&opener->lock, NULL);

	if (err)
		return -err;
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	err = pthread_cond_init(&opener->changed, &monotonic);
	pthread_condattr_destroy(&monotonic);
	if (err)
		pthread_mutex_destroy(&opener->lock);
	return -err;
}

int vf_rbd_opener_init(struct vf_rbd_opener *opener, const struct vf_rbd_settings *settings, uint64_t device_bytes,
		       int notes_fd, uint32_t notes_offset)
{
	int err;

	*opener = (struct vf_rbd_opener){
		.settings = *settings,
		.device_bytes = device_bytes,
		.notes_fd = notes_fd,
		.notes_offset = notes_offset,
		.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
		.events_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
	};
	err = opener->wake_fd < 0 || opener->events_fd < 0 ? -errno : vf_rbd_opener_primitives(opener);
	if (err == 0)
		return 0;
	if (opener->wake_fd >= 0)
		close(opener->wake_fd);
	if (opener->events_fd >= 0)
		close(opener->events_fd);
	return err;
}

int vf_rbd_opener_start(struct vf_rbd_opener *opener)
{
	sigset_t all;
	sigset_t before;
	int err;

	/* Signals are for the worker's own thread: one that ends it has to end its sleep. */
	sigfillset(&all);
	sigdelset(&all, SIGBUS); /* of a thread that touches a driver's memory */
	sigdelset(&all, SIGSEGV);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	err = pthread_create(&opener->thread, NULL, vf_rbd_opener_run, opener);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	opener->has_thread = err == 0;
	return -err;
}

int vf_rbd_opener_stop(struct vf_rbd_opener *opener, uint32_t limit_ms)
{
	struct timespec until;
	int err = 0;

	if (!opener->has_thread)
		return 0;
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += (time_t)(limit_ms / 1000u);
	pthread_mutex_lock(&opener->lock);
	opener->stop = 1;
	pthread_cond_broadcast(&opener->changed);
	while (!opener->ended && err == 0)
		err = pthread_cond_timedwait(&opener->changed, &opener->lock, &until);
	err = opener->ended ? 0 : -ETIMEDOUT;
	pthread_mutex_unlock(&opener->lock);
	if (err)
		pthread_detach(opener->thread);
	else
		pthread_join(opener->thread, NULL);
	opener->has_thread = 0;
	return err;
}

void vf_rbd_opener_destroy(struct vf_rbd_opener *opener)
{
	pthread_cond_destroy(&opener->changed);
	pthread_mutex_destroy(&opener->lock);
	close(opener->wake_fd);
	close(opener->events_fd);
}
