/* SPDX-License-Identifier: Apache-2.0
 *
 * An image of Ceph RBD: from the names of a URI to an open handle. All calls here block.
 */
#ifndef VF_RBD_IMAGE_H
#define VF_RBD_IMAGE_H

#include <rados/librados.h>
#include <rbd/librbd.h>
#include <stddef.h>
#include <stdint.h>

#define VF_RBD_ADDRESS_MAX 256u
#define VF_RBD_CLIENT_MAX 384u /* what vf_rbd_client() fills at most */
#define VF_RBD_IDENTITY_MAX 256u
#define VF_RBD_NOBODY 1
#define VF_RBD_OWNER_MAX 8u

/* Which step of opening an image failed, in their order. */
enum vf_rbd_step {
	VF_RBD_CLIENT, /* making a client */
	VF_RBD_CONF, /* reading the configuration file */
	VF_RBD_CONNECT, /* reaching the monitors, and being let in */
	VF_RBD_FENCE, /* shutting out the previous client */
	VF_RBD_POOL,
	VF_RBD_NAMESPACE,
	VF_RBD_IMAGE,
	VF_RBD_SNAP,
	VF_RBD_OPEN, /* all of them done */
};

/* Strings are borrowed; an empty one is as none. */
struct vf_rbd_settings {
	const char *conf;
	const char *id;
	const char *keyring;
	const char *pool;
	const char *name_space;
	const char *image;
	const char *snap;
	const char *wanted; /* the image's identity, where another one under its name is to be refused (-ESTALE) */
	uint8_t read_only;
	uint8_t early_writes; /* librbd may complete a write that is only in its memory, if it is configured to */
	uint32_t connect_limit_s; /* for the monitors to answer */
	uint32_t op_limit_s; /* an operation that takes longer fails with -ETIMEDOUT; 0: no limit */
};

struct vf_rbd_image {
	rados_t cluster;
	rados_ioctx_t pool;
	rbd_image_t image;
	enum vf_rbd_step reached;
};

/* The properties of an image that a device needs. */
struct vf_rbd_about {
	uint64_t size_bytes;
	uint64_t object_bytes;
	uint64_t stripe_unit_bytes;
	uint64_t stripe_count;
	uint8_t exclusive_lock;
	uint8_t caches; /* librbd keeps data of it in memory */
	uint8_t early_writes; /* and completes writes that are only there */
	char identity[VF_RBD_IDENTITY_MAX]; /* "": not known */
};

/* 0 or -errno. `reached` is the step that failed then, else VF_RBD_OPEN; either way vf_rbd_image_close() follows.
 * `before` is the result of vf_rbd_client() of a client that had the image and is certainly dead. It is blocklisted, so that
 * none of its requests takes effect any more. `*fenced` is 0 then, a negative errno when we lack the right, or VF_RBD_NOBODY:
 * there was none in this cluster. */
int vf_rbd_image_open(struct vf_rbd_image *image, const struct vf_rbd_settings *settings, const char *before, int *fenced);

/* Flush, and close all that was opened. If the cluster is lost this waits for ever, unless op_limit_s was set. */
void vf_rbd_image_close(struct vf_rbd_image *image);

/* The identity of this client: the cluster's id, a space, and the address as a lock names its owner. 0 or -errno. */
int vf_rbd_client(const struct vf_rbd_image *image, char text[static VF_RBD_CLIENT_MAX]);

int vf_rbd_about(const struct vf_rbd_image *image, struct vf_rbd_about *about);

/* The value of an option of this client. 0 or -errno. */
int vf_rbd_option(const struct vf_rbd_image *image, const char *name, char *value, size_t size);

/* The names there are where the step that failed has looked for one, each ended by a 0, at the end an empty one. As many as
 * have room, whole. The number of bytes, or -errno. */
int vf_rbd_names(const struct vf_rbd_image *image, char *names, size_t size);

#endif
