/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "rbd/engine_rbd.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "base/barrier.h"

#define VF_RBD_REAP_MAX 64
#define VF_RBD_POLL_MS 100 /* how often requests that wait for the image are checked */
#define VF_RBD_CLOSE_LIMIT_MS 3000u

/* The state of an open engine. A request is in at most one of the two queues; each has room for all. */
struct vf_rbd_work {
	struct vf_req **waiting; /* for the image to be open, in their order */
	double *since_s; /* of those */
	struct vf_req **finished; /* not handed out yet */
	uint32_t slot_count;
	uint32_t waiting_count;
	uint32_t finished_count;
	double opening_since_s;
	uint8_t open; /* as the loop's thread has seen it */
	uint8_t gave_up;
	uint8_t logged_shut_out;
	uint8_t logged_timed_out;
};

static double vf_rbd_now_s(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void vf_rbd_work_free(struct vf_rbd_work *work)
{
	free(work->waiting);
	free(work->since_s);
	free(work->finished);
	free(work);
}

static int vf_rbd_open(struct vf_engine *engine, uint32_t slot_count)
{
	struct vf_rbd *rbd = engine->context;
	struct vf_rbd_work *work = calloc(1, sizeof(*work));
	int err;

	if (!work)
		return -ENOMEM;
	work->slot_count = slot_count;
	work->waiting = calloc(slot_count, sizeof(*work->waiting));
	work->since_s = calloc(slot_count, sizeof(*work->since_s));
	work->finished = calloc(slot_count, sizeof(*work->finished));
	err = work->waiting && work->since_s && work->finished ? 0 : -ENOMEM;
	if (err == 0)
		err = vf_rbd_opener_start(&rbd->opener);
	if (err) {
		vf_rbd_work_free(work);
		return err;
	}
	work->opening_since_s = vf_rbd_now_s();
	engine->state = work;
	engine->always = 1;
	return 0;
}

/* The kinds of request that librbd need not see. */
static int vf_rbd_is_nothing(const struct vf_engine *engine, const struct vf_req *req)
{
	return req->op == VF_OP_FLUSH && engine->store.cache == VF_CACHE_UNSAFE;
}

static int vf_rbd_call(rbd_image_t image, struct vf_req *req, rbd_completion_t completion)
{
	switch ((enum vf_op)req->op) {
	case VF_OP_READ:
		return rbd_aio_readv(image, req->iov, (int)req->iov_count, req->offset_bytes, completion);
	case VF_OP_WRITE:
		return rbd_aio_writev(image, req->iov, (int)req->iov_count, req->offset_bytes, completion);
	case VF_OP_FLUSH:
		return rbd_aio_flush(image, completion);
	case VF_OP_DISCARD:
		return rbd_aio_discard(image, req->offset_bytes, req->left_bytes, completion);
	case VF_OP_WRITE_ZEROES:
		return rbd_aio_write_zeroes(image, req->offset_bytes, req->left_bytes, completion,
					    req->unmap ? 0 : RBD_WRITE_ZEROES_FLAG_THICK_PROVISION, 0);
	default:
		return -EOPNOTSUPP;
	}
}

/* Of what a completion leads to: it is the flush after a write, and not the request. Requests lie at even addresses. */
#define VF_RBD_IS_FLUSH ((uintptr_t)1)

/* Pass a request, or the flush after it, to librbd. 0 or -errno. */
static int vf_rbd_start(struct vf_engine *engine, struct vf_req *req, int is_flush)
{
	struct vf_rbd *rbd = engine->context;
	rbd_image_t image = rbd->opener.image.image;
	rbd_completion_t completion;
	uintptr_t tagged = (uintptr_t)req | (is_flush ? VF_RBD_IS_FLUSH : 0);
	int err = rbd_aio_create_completion((void *)tagged, NULL, &completion);

	if (err)
		return err;
	err = is_flush ? rbd_aio_flush(image, completion) : vf_rbd_call(image, req, completion);
	if (err)
		rbd_aio_release(completion);
	return err;
}

/* Log once a cause that the driver's error does not show. */
static void vf_rbd_report_error(struct vf_engine *engine, int err)
{
	struct vf_rbd *rbd = engine->context;
	struct vf_rbd_work *work = engine->state;

	if (err == -ESHUTDOWN && !work->logged_shut_out) {
		work->logged_shut_out = 1;
		vf_rbd_event_put(&rbd->opener, (struct vf_rbd_event){ .kind = VF_RBD_EVENT_SHUT_OUT });
	} else if (err == -ETIMEDOUT && !work->logged_timed_out) {
		work->logged_timed_out = 1;
		vf_rbd_event_put(&rbd->opener, (struct vf_rbd_event){ .kind = VF_RBD_EVENT_TIMED_OUT });
	} else if (err >= 0) {
		work->logged_timed_out = 0; /* the cluster answers again */
	}
}

static int vf_rbd_submit(struct vf_engine *engine, struct vf_req *req)
{
	struct vf_rbd_work *work = engine->state;
	int err;

	if (vf_rbd_is_nothing(engine, req)) {
		req->result = 0;
		return 1;
	}
	if (vf_likely(work->open)) {
		err = vf_rbd_start(engine, req, 0);
		if (vf_unlikely(err)) {
			vf_rbd_report_error(engine, err);
			req->result = err;
			return 1;
		}
	} else if (work->gave_up) {
		req->result = -ENOTCONN;
		return 1;
	} else {
		work->since_s[work->waiting_count] = vf_rbd_now_s();
		work->waiting[work->waiting_count++] = req;
	}
	engine->inflight_count++;
	return 0;
}

static void vf_rbd_finish(struct vf_rbd_work *work, struct vf_req *req, int result)
{
	req->result = result;
	work->finished[work->finished_count++] = req;
}

/* Process a completion; the request is finished, unless a flush after it has begun. */
static void vf_rbd_digest(struct vf_engine *engine, struct vf_req *req, int is_flush, ssize_t got)
{
	const struct vf_rbd *rbd = engine->context;
	struct vf_rbd_work *work = engine->state;
	int err = got < 0 ? (int)got : 0;

	vf_rbd_report_error(engine, err);
	if (req->op == VF_OP_READ && got > 0) {
		uint64_t filled = (uint64_t)got < req->left_bytes ? (uint64_t)got : req->left_bytes;

		vf_req_advance(req, filled);
	}
	/* Less than asked for: the image has become smaller, and the device will. */
	if (req->op == VF_OP_READ && err == 0 && req->left_bytes)
		err = -EIO;
	if (err == 0 && !is_flush && (engine->store.write_flags || rbd->opener.early_writes) &&
	    (req->op == VF_OP_WRITE || req->op == VF_OP_WRITE_ZEROES)) {
		err = vf_rbd_start(engine, req, 1);
		if (err == 0)
			return;
	}
	vf_rbd_finish(work, req, err);
}

/* The image is open: start the requests that have waited for it. */
static void vf_rbd_admit(struct vf_engine *engine)
{
	struct vf_rbd_work *work = engine->state;
	uint32_t count = work->waiting_count;

	work->open = 1;
	work->gave_up = 0;
	work->waiting_count = 0;
	for (uint32_t i = 0; i < count; i++) {
		int err = vf_rbd_start(engine, work->waiting[i], 0);

		if (err)
			vf_rbd_finish(work, work->waiting[i], err);
	}
}

/* The image is not open yet: end requests that have waited for too long. */
static void vf_rbd_expire(struct vf_engine *engine)
{
	struct vf_rbd *rbd = engine->context;
	struct vf_rbd_work *work = engine->state;
	double now_s = vf_rbd_now_s();
	uint32_t expired = 0;

	if (!work->gave_up && now_s - work->opening_since_s >= rbd->reconnect_s) {
		work->gave_up = 1;
		vf_rbd_event_put(&rbd->opener, (struct vf_rbd_event){ .kind = VF_RBD_EVENT_GAVE_UP });
	}
	while (expired < work->waiting_count &&
	       (work->gave_up || (rbd->wait_limit_s > 0 && now_s - work->since_s[expired] >= rbd->wait_limit_s)))
		vf_rbd_finish(work, work->waiting[expired++], -ENOTCONN);
	work->waiting_count -= expired;
	for (uint32_t i = 0; i < work->waiting_count && expired; i++) {
		work->waiting[i] = work->waiting[i + expired];
		work->since_s[i] = work->since_s[i + expired];
	}
}

/* Do the work that is due before the image is open, or when it has just been opened. */
static void vf_rbd_look(struct vf_engine *engine)
{
	struct vf_rbd *rbd = engine->context;

	if (vf_rbd_is_open(&rbd->opener))
		vf_rbd_admit(engine);
	else
		vf_rbd_expire(engine);
}

static void vf_rbd_poll(struct vf_engine *engine)
{
	struct vf_rbd *rbd = engine->context;
	rbd_completion_t completions[VF_RBD_REAP_MAX];
	int count = rbd_poll_io_events(rbd->opener.image.image, completions, VF_RBD_REAP_MAX);

	for (int i = 0; i < count; i++) {
		uintptr_t tagged = (uintptr_t)rbd_aio_get_arg(completions[i]);
		ssize_t got = rbd_aio_get_return_value(completions[i]);

		rbd_aio_release(completions[i]);
		vf_rbd_digest(engine, (struct vf_req *)(tagged & ~VF_RBD_IS_FLUSH), (tagged & VF_RBD_IS_FLUSH) != 0, got);
	}
}

static uint32_t vf_rbd_reap(struct vf_engine *engine, struct vf_req **done, uint32_t max)
{
	struct vf_rbd *rbd = engine->context;
	struct vf_rbd_work *work = engine->state;
	uint32_t count;

	if (vf_unlikely(!work->open))
		vf_rbd_look(engine);
	if (vf_likely(work->open))
		vf_rbd_poll(engine);
	if (vf_unlikely(vf_rbd_has_events(&rbd->opener)))
		engine->readable |= VF_READABLE_EVENTS;
	count = work->finished_count < max ? work->finished_count : max;
	for (uint32_t i = 0; i < count; i++)
		done[i] = work->finished[i];
	work->finished_count -= count;
	for (uint32_t i = 0; i < work->finished_count && count; i++)
		work->finished[i] = work->finished[i + count];
	engine->inflight_count -= count;
	return count;
}

static int vf_rbd_sleep(struct vf_engine *engine, const int *fds, uint32_t count, int timeout_ms)
{
	struct vf_rbd *rbd = engine->context;
	struct vf_rbd_work *work = engine->state;
	struct pollfd polled[VF_WATCH_MAX + 1u];
	uint64_t raised;
	ssize_t got;
	int ready;

	for (uint32_t i = 0; i < count; i++)
		polled[i] = (struct pollfd){ .fd = fds[i], .events = POLLIN };
	polled[count] = (struct pollfd){ .fd = rbd->opener.wake_fd, .events = POLLIN };
	ready = poll(polled, count + 1u, work->open || timeout_ms < VF_RBD_POLL_MS ? timeout_ms : VF_RBD_POLL_MS);
	if (ready > 0) {
		for (uint32_t i = 0; i < count; i++)
			engine->readable |= (uint32_t)(polled[i].revents != 0) << i;
	}
	if (ready > 0 && polled[count].revents) {
		/* Before the list is looked at: what is added to it from now on makes this readable again. */
		got = read(rbd->opener.wake_fd, &raised, sizeof(raised));
		(void)got; /* it is not readable now either way */
	}
	if (!work->open)
		vf_rbd_look(engine);
	if (vf_rbd_has_events(&rbd->opener))
		engine->readable |= VF_READABLE_EVENTS;
	return ready == 0;
}

static void vf_rbd_wait(struct vf_engine *engine)
{
	vf_rbd_sleep(engine, NULL, 0, VF_RBD_POLL_MS);
}

static void vf_rbd_flush(struct vf_engine *engine)
{
	(void)engine; /* submit() starts everything */
}

static void vf_rbd_close(struct vf_engine *engine)
{
	struct vf_rbd *rbd = engine->context;

	rbd->gone = vf_rbd_opener_stop(&rbd->opener, VF_RBD_CLOSE_LIMIT_MS) != 0;
	vf_rbd_work_free(engine->state);
	engine->state = NULL;
}

static const struct vf_engine_ops vf_engine_rbd = {
	.name = "rbd",
	.open = vf_rbd_open,
	.submit = vf_rbd_submit,
	.flush = vf_rbd_flush,
	.reap = vf_rbd_reap,
	.wait = vf_rbd_wait,
	.sleep = vf_rbd_sleep,
	.close = vf_rbd_close,
	.publish_batch = 8,
};

struct vf_rbd *vf_rbd_create(const struct vf_rbd_settings *settings, uint64_t device_bytes, double timeout_s,
			     double reconnect_s, int notes_fd, uint32_t notes_offset)
{
	struct vf_rbd *rbd = calloc(1, sizeof(*rbd));
	int err;

	if (!rbd)
		return NULL;
	rbd->plugin = (struct vf_engine_plugin)VF_ENGINE_PLUGIN(&vf_engine_rbd, rbd);
	rbd->reconnect_s = reconnect_s;
	rbd->wait_limit_s = timeout_s;
	err = vf_rbd_opener_init(&rbd->opener, settings, device_bytes, notes_fd, notes_offset);
	if (err) {
		free(rbd);
		errno = -err;
		return NULL;
	}
	return rbd;
}

int vf_rbd_destroy(struct vf_rbd *rbd)
{
	if (rbd->gone)
		return -ETIMEDOUT;
	vf_rbd_opener_destroy(&rbd->opener);
	free(rbd);
	return 0;
}
