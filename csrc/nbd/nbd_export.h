/* SPDX-License-Identifier: Apache-2.0
 *
 * The start of a connection to an NBD server: a handle of libnbd with our settings, and the properties of the export.
 */
#ifndef VF_NBD_EXPORT_H
#define VF_NBD_EXPORT_H

#include <stddef.h>
#include <stdint.h>

#include <libnbd.h>

#define VF_NBD_TEXT_BYTES 400u
#define VF_NBD_LIST_MAX 8u /* exports that a message names */
/* Of a request that carries data, if the server sets no limit: every server accepts this. */
#define VF_NBD_PAYLOAD_MAX_BYTES (32u << 20)

struct vf_nbd_export {
	uint64_t size_bytes;
	uint32_t block_min_bytes; /* 1 if the server does not report it */
	uint32_t block_preferred_bytes; /* 0 if the server does not report it */
	uint32_t block_max_bytes; /* of a request that carries data */
	uint8_t read_only;
	uint8_t is_rotational;
	uint8_t can_flush;
	uint8_t can_fua;
	uint8_t can_trim;
	uint8_t can_zero;
	uint8_t can_fast_zero;
	uint8_t can_multi_conn;
};

/* A handle that is not connected; NULL with text filled in. listing: stop before the export is chosen. */
struct nbd_handle *vf_nbd_handle_new(int listing, char *text, size_t text_bytes);

/* Read the properties of a connected handle's export. 0, or -EPROTO with text filled in: it cannot be served. */
int vf_nbd_export_read(struct nbd_handle *handle, struct vf_nbd_export *export, char *text, size_t text_bytes);

/* Put libnbd's last error into text, without the name of the call that it begins with. */
void vf_nbd_error_text(char *text, size_t text_bytes);

/* The stage at which a probe ended. */
enum vf_nbd_stage {
	VF_NBD_STAGE_URI,
	VF_NBD_STAGE_CONNECT,
	VF_NBD_STAGE_HANDSHAKE,
	VF_NBD_STAGE_EXPORT,
};

struct vf_nbd_probe {
	struct vf_nbd_export export;
	enum vf_nbd_stage stage;
	int err; /* libnbd's errno, ETIMEDOUT, or 0 */
	char text[VF_NBD_TEXT_BYTES];
	uint32_t listed_count; /* of the exports that the server has listed */
	char listed[VF_NBD_LIST_MAX][64];
};

/* Connect, blocking for at most limit_ms, and read the export's properties. 0, or -1 with stage, err and text filled in. */
int vf_nbd_probe(struct vf_nbd_probe *probe, const char *uri, int limit_ms);

/* List the exports of that URI's server; none if it does not list them. */
void vf_nbd_list(struct vf_nbd_probe *probe, const char *uri, int limit_ms);

#endif
