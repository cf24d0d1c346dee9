/* SPDX-License-Identifier: Apache-2.0
 *
 * Requests and replies under TLS: libnbd's asynchronous calls, as the socket and its session belong to it.
 */
#include "nbd/internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/barrier.h"

/* Runs inside of libnbd, which must not be called again from here. 1: libnbd forgets the command. */
static int vf_nbd_on_answer(void *context, int *error)
{
	struct vf_nbd_cmd *cmd = context;
	struct vf_nbd *nbd = cmd->nbd;

	/* Not an answer, but the end of the connection; the server has no such error. */
	if (*error == ENOTCONN)
		return 1;
	vf_nbd_answer(nbd, cmd, *error);
	return 1;
}

void vf_nbd_tls_send(struct vf_nbd *nbd, struct vf_nbd_cmd *cmd)
{
	struct nbd_handle *handle = nbd->link.handle;
	nbd_completion_callback done = { .callback = vf_nbd_on_answer, .user_data = cmd };
	int64_t cookie = -1;
	int err;

	switch ((enum vf_nbd_kind)cmd->kind) {
	case VF_NBD_READ:
		cookie = nbd_aio_pread(handle, cmd->data, cmd->len_bytes, cmd->offset_bytes, done, 0);
		break;
	case VF_NBD_WRITE:
		cookie = nbd_aio_pwrite(handle, cmd->data, cmd->len_bytes, cmd->offset_bytes, done, cmd->flags);
		break;
	case VF_NBD_FLUSH:
		cookie = nbd_aio_flush(handle, done, 0);
		break;
	case VF_NBD_TRIM:
		cookie = nbd_aio_trim(handle, cmd->len_bytes, cmd->offset_bytes, done, cmd->flags);
		break;
	case VF_NBD_ZERO:
		cookie = nbd_aio_zero(handle, cmd->len_bytes, cmd->offset_bytes, done, cmd->flags);
		break;
	}
	if (vf_likely(cookie >= 0))
		return;
	err = nbd_get_errno();
	if (nbd_aio_get_direction(handle)) /* otherwise it has died: the next check finds it */
		vf_nbd_answer(nbd, cmd, err > 0 && err != ESHUTDOWN ? err : EIO);
}

int vf_nbd_tls_look(struct vf_nbd *nbd, char *text, size_t text_bytes, int *err)
{
	struct vf_nbd_link *link = &nbd->link;
	unsigned int direction;
	int rc = 0, is_closed;

	/* libnbd consumes an error of the socket and reports a failure of TLS, so read the error first. */
	*err = vf_nbd_socket_err(link->fd, &is_closed);
	if (vf_unlikely(*err || is_closed)) {
		snprintf(text, text_bytes, "%s", *err ? strerror(*err) : "it has failed, and the cause is lost");
		*err = *err ? *err : EIO;
		return -1;
	}
	for (uint32_t i = 0; i < nbd->slot_count; i++) {
		uint32_t before = nbd->answered_count;

		direction = nbd_aio_get_direction(link->handle);
		if (direction & LIBNBD_AIO_DIRECTION_WRITE)
			rc = nbd_aio_notify_write(link->handle);
		if (rc == 0 && nbd_aio_get_direction(link->handle) & LIBNBD_AIO_DIRECTION_READ)
			rc = nbd_aio_notify_read(link->handle);
		if (rc < 0 || nbd->answered_count == before)
			break;
	}
	/* It may be that nothing failed now, but while a command was sent. */
	if (vf_likely(rc == 0 && nbd_aio_get_direction(link->handle)))
		return 0;
	*err = nbd_get_errno();
	if (rc == 0 && nbd_aio_is_closed(link->handle) == 1)
		snprintf(text, text_bytes, "the server has closed it");
	else
		vf_nbd_error_text(text, text_bytes);
	return -1;
}
