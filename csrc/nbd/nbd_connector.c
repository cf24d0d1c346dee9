/* SPDX-License-Identifier: Apache-2.0
 *
 * A thread that makes a connection, because connecting waits without a limit that we could set. The name service may be
 * unreachable, and key files may lie on hanging storage. A loop that waited for these could not even answer the supervisor.
 * Each attempt has its own thread, resolves the name again, tries all addresses, and ends when it hands its connection over.
 */
#define _GNU_SOURCE
#include "nbd/internal.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/barrier.h"

#define VF_NBD_HANDSHAKE_NS (10000u * VF_NBD_MS) /* from the first packet on */
#define VF_NBD_STACK_BYTES (512u << 10)
#define VF_NBD_LOOK_MS 100

enum vf_nbd_attempt_state {
	VF_NBD_ATTEMPT_RUNS,
	VF_NBD_ATTEMPT_DONE, /* the result is there, the thread ends */
	VF_NBD_ATTEMPT_LEFT, /* the loop has stopped waiting: the thread cleans up */
};

struct vf_nbd_attempt {
	char uri[VF_NBD_URI_BYTES];
	pthread_t thread;
	int done_fd; /* an eventfd, readable when the result is there */
	uint32_t state; /* enum vf_nbd_attempt_state */
	struct nbd_handle *handle; /* that of the connection; NULL: text says why there is none */
	char text[VF_NBD_TEXT_BYTES];
};

static void vf_nbd_attempt_free(struct vf_nbd_attempt *attempt)
{
	nbd_close(attempt->handle);
	close(attempt->done_fd);
	free(attempt);
}

/* Run a handle that connects until it is ready. 0, or -1 with text filled in. */
static int vf_nbd_attempt_shake(struct vf_nbd_attempt *attempt)
{
	uint64_t end_ns = vf_now_ns() + VF_NBD_HANDSHAKE_NS;

	while (nbd_aio_is_connecting(attempt->handle) == 1) {
		if (vf_load_acquire_u32(&attempt->state) == VF_NBD_ATTEMPT_LEFT)
			return -1;
		if (vf_now_ns() >= end_ns) {
			snprintf(attempt->text, sizeof(attempt->text), "the server does not continue the handshake");
			return -1;
		}
		if (nbd_poll(attempt->handle, VF_NBD_LOOK_MS) < 0) {
			vf_nbd_error_text(attempt->text, sizeof(attempt->text));
			return -1;
		}
	}
	if (nbd_aio_is_ready(attempt->handle) == 1)
		return 0;
	snprintf(attempt->text, sizeof(attempt->text), "the server has hung up in the handshake");
	return -1;
}

static int vf_nbd_attempt_connect(struct vf_nbd_attempt *attempt)
{
	attempt->handle = vf_nbd_handle_new(0, attempt->text, sizeof(attempt->text));
	if (!attempt->handle)
		return -1;
	if (nbd_aio_connect_uri(attempt->handle, attempt->uri) == 0)
		return vf_nbd_attempt_shake(attempt);
	vf_nbd_error_text(attempt->text, sizeof(attempt->text));
	return -1;
}

static void *vf_nbd_attempt_run(void *context)
{
	struct vf_nbd_attempt *attempt = context;
	uint64_t one = 1;
	cpu_set_t all;

	/* Threads begin on the CPU of the loop, which may spin there. */
	memset(&all, 0xff, sizeof(all));
	sched_setaffinity(0, sizeof(all), &all);
	if (vf_nbd_attempt_connect(attempt)) {
		nbd_close(attempt->handle);
		attempt->handle = NULL;
	}
	if (!vf_exchange_if_u32(&attempt->state, VF_NBD_ATTEMPT_RUNS, VF_NBD_ATTEMPT_DONE)) {
		vf_nbd_attempt_free(attempt);
		return NULL;
	}
	/* Not freed meanwhile: the loop waits for our end before it frees this. */
	(void)!write(attempt->done_fd, &one, sizeof(one));
	return NULL;
}

static int vf_nbd_attempt_start(struct vf_nbd_attempt *attempt)
{
	pthread_attr_t attr;
	sigset_t all;
	sigset_t before;
	int err = pthread_attr_init(&attr);

	if (err)
		return err;
	pthread_attr_setstacksize(&attr, VF_NBD_STACK_BYTES);
	/* Signals are for the worker's own thread: one that ends it has to end its sleep. */
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	err = pthread_create(&attempt->thread, &attr, vf_nbd_attempt_run, attempt);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attr);
	return err;
}

struct vf_nbd_attempt *vf_nbd_attempt_begin(const char *uri)
{
	struct vf_nbd_attempt *attempt = calloc(1, sizeof(*attempt));
	int err;

	if (!attempt)
		return NULL;
	snprintf(attempt->uri, sizeof(attempt->uri), "%s", uri);
	attempt->done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (attempt->done_fd < 0) {
		free(attempt);
		return NULL;
	}
	err = vf_nbd_attempt_start(attempt);
	if (err) {
		vf_nbd_attempt_free(attempt);
		errno = err;
		return NULL;
	}
	return attempt;
}

int vf_nbd_attempt_fd(const struct vf_nbd_attempt *attempt)
{
	return attempt->done_fd;
}

int vf_nbd_attempt_is_done(const struct vf_nbd_attempt *attempt)
{
	return vf_load_acquire_u32(&attempt->state) == VF_NBD_ATTEMPT_DONE;
}

struct nbd_handle *vf_nbd_attempt_end(struct vf_nbd_attempt *attempt, char *text, size_t text_bytes)
{
	struct nbd_handle *handle = attempt->handle;

	pthread_join(attempt->thread, NULL); /* it has nothing more to do */
	attempt->handle = NULL;
	snprintf(text, text_bytes, "%s", attempt->text);
	vf_nbd_attempt_free(attempt);
	return handle;
}

void vf_nbd_attempt_leave(struct vf_nbd_attempt *attempt)
{
	pthread_t thread;

	if (!attempt)
		return;
	thread = attempt->thread;
	if (vf_exchange_if_u32(&attempt->state, VF_NBD_ATTEMPT_RUNS, VF_NBD_ATTEMPT_LEFT)) {
		pthread_detach(thread);
		return;
	}
	pthread_join(thread, NULL);
	vf_nbd_attempt_free(attempt);
}
