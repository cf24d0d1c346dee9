/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "nbd/nbd_export.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define VF_NBD_BLOCK_MAX_BYTES 65536u

void vf_nbd_error_text(char *text, size_t text_bytes)
{
	const char *error = nbd_get_error();
	const char *colon;

	if (!error)
		error = "unknown error";
	/* "nbd_aio_notify_read: recv: ..." */
	if (strncmp(error, "nbd_", 4) == 0) {
		colon = strstr(error, ": ");
		if (colon)
			error = colon + 2;
	}
	snprintf(text, text_bytes, "%s", error);
}

struct nbd_handle *vf_nbd_handle_new(int listing, char *text, size_t text_bytes)
{
	struct nbd_handle *handle = nbd_create();

	/* A simple reply has all requested bytes, or an error. So a server that sends its reply in odd pieces cannot leave a part
	 * of a buffer out, buffers need not be cleared before, and it takes one system call less. A URI may name key files, and
	 * decides about TLS. */
	if (handle && nbd_set_request_structured_replies(handle, false) == 0 &&
	    nbd_set_pread_initialize(handle, false) == 0 && nbd_set_uri_allow_local_file(handle, true) == 0 &&
	    nbd_set_uri_allow_tls(handle, LIBNBD_TLS_ALLOW) == 0 && nbd_set_full_info(handle, false) == 0 &&
	    nbd_set_opt_mode(handle, listing) == 0)
		return handle;
	vf_nbd_error_text(text, text_bytes);
	nbd_close(handle);
	return NULL;
}

static uint32_t vf_nbd_block_size(struct nbd_handle *handle, int type, uint32_t otherwise)
{
	int64_t size = nbd_get_block_size(handle, type);

	if (size <= 0)
		return otherwise;
	return size < UINT32_MAX ? (uint32_t)size : UINT32_MAX;
}

int vf_nbd_export_read(struct nbd_handle *handle, struct vf_nbd_export *export, char *text, size_t text_bytes)
{
	int64_t size = nbd_get_size(handle);
	uint32_t block_min = vf_nbd_block_size(handle, LIBNBD_SIZE_MINIMUM, 1);
	uint32_t block_max = vf_nbd_block_size(handle, LIBNBD_SIZE_MAXIMUM, VF_NBD_PAYLOAD_MAX_BYTES);

	if (size < 0) {
		snprintf(text, text_bytes, "the server does not report the size of its export");
		return -EPROTO;
	}
	if (block_min & (block_min - 1u) || block_min > VF_NBD_BLOCK_MAX_BYTES || block_max < block_min) {
		snprintf(text, text_bytes, "the server's block sizes are impossible: from %u to %u bytes", block_min, block_max);
		return -EPROTO;
	}
	if (block_max > VF_NBD_PAYLOAD_MAX_BYTES)
		block_max = VF_NBD_PAYLOAD_MAX_BYTES;
	*export = (struct vf_nbd_export){
		.size_bytes = (uint64_t)size,
		.block_min_bytes = block_min,
		.block_preferred_bytes = vf_nbd_block_size(handle, LIBNBD_SIZE_PREFERRED, 0),
		.block_max_bytes = block_max - block_max % block_min,
		.read_only = nbd_is_read_only(handle) == 1,
		.is_rotational = nbd_is_rotational(handle) == 1,
		.can_flush = nbd_can_flush(handle) == 1,
		.can_fua = nbd_can_fua(handle) == 1,
		.can_trim = nbd_can_trim(handle) == 1,
		.can_zero = nbd_can_zero(handle) == 1,
		.can_fast_zero = nbd_can_fast_zero(handle) == 1,
		.can_multi_conn = nbd_can_multi_conn(handle) == 1,
	};
	return 0;
}

static int64_t vf_nbd_now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000ll + now.tv_nsec / 1000000;
}

static int vf_nbd_probe_fail(struct vf_nbd_probe *probe)
{
	probe->err = nbd_get_errno();
	vf_nbd_error_text(probe->text, sizeof(probe->text));
	return -1;
}

/* Run a handle that connects until it does so no more; notes the stage. 0, or -1 with err and text filled in. */
static int vf_nbd_probe_run(struct vf_nbd_probe *probe, struct nbd_handle *handle, int64_t end_ms)
{
	while (nbd_aio_is_connecting(handle) == 1) {
		int64_t left_ms = end_ms - vf_nbd_now_ms();
		struct sockaddr_storage peer;
		socklen_t peer_bytes = sizeof(peer);

		if (getpeername(nbd_aio_get_fd(handle), (struct sockaddr *)&peer, &peer_bytes) == 0)
			probe->stage = VF_NBD_STAGE_HANDSHAKE;
		if (left_ms <= 0) {
			probe->err = ETIMEDOUT;
			return -1;
		}
		if (nbd_poll(handle, (int)left_ms) < 0)
			return vf_nbd_probe_fail(probe);
	}
	if (nbd_aio_is_closed(handle) == 1 || nbd_aio_is_dead(handle) == 1) {
		probe->err = ECONNRESET;
		snprintf(probe->text, sizeof(probe->text), "the server has hung up");
		return -1;
	}
	return 0;
}

int vf_nbd_probe(struct vf_nbd_probe *probe, const char *uri, int limit_ms)
{
	int64_t end_ms = vf_nbd_now_ms() + limit_ms;
	struct nbd_handle *handle;
	int rc = -1;

	*probe = (struct vf_nbd_probe){ .stage = VF_NBD_STAGE_URI };
	handle = vf_nbd_handle_new(0, probe->text, sizeof(probe->text));
	if (!handle)
		return -1;
	if (nbd_aio_connect_uri(handle, uri) < 0) {
		/* A URI that cannot be is an error before anything is connected; a host may fail in the same call. */
		vf_nbd_probe_fail(probe);
		if (nbd_aio_is_created(handle) != 1 || strncmp(probe->text, "connect", 7) == 0 ||
		    strncmp(probe->text, "getaddrinfo", 11) == 0)
			probe->stage = VF_NBD_STAGE_CONNECT;
	} else {
		probe->stage = VF_NBD_STAGE_CONNECT;
		rc = vf_nbd_probe_run(probe, handle, end_ms);
	}
	if (rc == 0) {
		probe->stage = VF_NBD_STAGE_EXPORT;
		rc = vf_nbd_export_read(handle, &probe->export, probe->text, sizeof(probe->text)) ? -1 : 0;
		nbd_aio_disconnect(handle, 0);
	}
	nbd_close(handle);
	return rc;
}

static int vf_nbd_listed(void *context, const char *name, const char *description)
{
	struct vf_nbd_probe *probe = context;

	(void)description;
	if (probe->listed_count < VF_NBD_LIST_MAX)
		snprintf(probe->listed[probe->listed_count], sizeof(probe->listed[0]), "%s", name);
	probe->listed_count++;
	return 0;
}

void vf_nbd_list(struct vf_nbd_probe *probe, const char *uri, int limit_ms)
{
	int64_t end_ms = vf_nbd_now_ms() + limit_ms;
	char text[VF_NBD_TEXT_BYTES];
	struct nbd_handle *handle = vf_nbd_handle_new(1, text, sizeof(text));

	probe->listed_count = 0;
	if (!handle)
		return;
	/* It stops in front of the options; the list is one of those, and stops there again. */
	if (nbd_aio_connect_uri(handle, uri) < 0 || vf_nbd_probe_run(probe, handle, end_ms) < 0 ||
	    nbd_aio_opt_list(handle, (nbd_list_callback){ .callback = vf_nbd_listed, .user_data = probe },
			     NBD_NULL_COMPLETION) < 0 ||
	    vf_nbd_probe_run(probe, handle, end_ms) < 0)
		probe->listed_count = 0;
	nbd_close(handle);
}
