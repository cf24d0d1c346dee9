/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "rbd/image.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <rbd/features.h>

#define VF_RBD_SNAP_MAX 64
#define VF_RBD_FEW_CPUS 4
#define VF_RBD_IMAGE_MAX 256u
#define VF_RBD_OPTION_MAX 512
#define VF_RBD_FSID_BYTES 37u
#define VF_RBD_ID_MAX 128u

static int vf_rbd_given(const char *text)
{
	return text && *text;
}

/* If this library does not know an option, it does not need it. */
static void vf_rbd_set(rados_t cluster, const char *name, uint32_t value)
{
	char text[16];

	snprintf(text, sizeof(text), "%u", value);
	rados_conf_set(cluster, name, text);
}

/* With one thread of librados per CPU, on few CPUs, a request costs a third more than with one thread, because the threads wake
 * each other. A configured number stays. */
static void vf_rbd_set_threads(rados_t cluster)
{
	char count[16] = "";
	cpu_set_t mine;

	if (sched_getaffinity(0, sizeof(mine), &mine) || CPU_COUNT(&mine) > VF_RBD_FEW_CPUS)
		return;
	if (rados_conf_get(cluster, "librados_thread_count", count, sizeof(count)) == 0 && strcmp(count, "2") == 0)
		vf_rbd_set(cluster, "librados_thread_count", 1);
}

/* A completed write must survive the death of this process: the driver does not learn of it, so it does not write again. The
 * default cache policy is for writes only, so without a cache reads are unchanged. Another policy keeps its cache for reads.
 * An image may have a configuration of its own, which overrides this one: see vf_rbd_about(). */
static void vf_rbd_set_cache(rados_t cluster)
{
	char policy[32] = "";

	if (rados_conf_get(cluster, "rbd_cache_policy", policy, sizeof(policy)))
		return; /* as old as that: writes are early, and vf_rbd_about() says so */
	if (strcmp(policy, "writearound") == 0)
		rados_conf_set(cluster, "rbd_cache", "false");
	else
		rados_conf_set(cluster, "rbd_cache_policy", "writethrough");
}

static int vf_rbd_configure(struct vf_rbd_image *image, const struct vf_rbd_settings *settings)
{
	int err;

	image->reached = VF_RBD_CLIENT;
	err = rados_create(&image->cluster, settings->id);
	if (err)
		return err;
	image->reached = VF_RBD_CONF;
	err = rados_conf_read_file(image->cluster, settings->conf);
	if (err)
		return err;
	if (vf_rbd_given(settings->keyring))
		rados_conf_set(image->cluster, "keyring", settings->keyring);
	vf_rbd_set(image->cluster, "client_mount_timeout", settings->connect_limit_s);
	if (settings->op_limit_s) {
		vf_rbd_set(image->cluster, "rados_osd_op_timeout", settings->op_limit_s);
		vf_rbd_set(image->cluster, "rados_mon_op_timeout", settings->op_limit_s);
	}
	vf_rbd_set_threads(image->cluster);
	if (!settings->early_writes)
		vf_rbd_set_cache(image->cluster);
	/* A driver may change a buffer while it is being written. Sent without a copy, it would not match its checksum, and
	 * the connection would be reset again and again. */
	rados_conf_set(image->cluster, "rbd_disable_zero_copy_writes", "true");
	return 0;
}

/* The part of an address that the owner of a lock is known by: without the protocol's version. */
static const char *vf_rbd_plain_address(const char *text)
{
	return text[0] == 'v' && text[1] != '\0' && text[2] == ':' ? text + 3 : text;
}

int vf_rbd_client(const struct vf_rbd_image *image, char text[static VF_RBD_CLIENT_MAX])
{
	char *addresses = NULL;
	int err = rados_cluster_fsid(image->cluster, text, VF_RBD_CLIENT_MAX);
	size_t used;
	int len;

	if (err < 0)
		return err;
	err = rados_getaddrs(image->cluster, &addresses);
	if (err)
		return err;
	used = strlen(text);
	len = snprintf(text + used, VF_RBD_CLIENT_MAX - used, " %s", vf_rbd_plain_address(addresses));
	rados_buffer_free(addresses);
	return (size_t)len < VF_RBD_CLIENT_MAX - used ? 0 : -ENAMETOOLONG;
}

/* The address in the result of vf_rbd_client(); NULL if that is of another cluster. */
static const char *vf_rbd_address_here(const struct vf_rbd_image *image, const char *client)
{
	char fsid[VF_RBD_ADDRESS_MAX];
	int len = rados_cluster_fsid(image->cluster, fsid, sizeof(fsid));

	if (len < 0 || strncmp(client, fsid, strlen(fsid)) != 0 || client[strlen(fsid)] != ' ')
		return NULL;
	return client + strlen(fsid) + 1;
}

/* Blocklist the previous client. The answer includes the cluster map that refuses it, and our requests carry that map's number:
 * no OSD serves them before it refuses the other client. */
static int vf_rbd_fence(struct vf_rbd_image *image, const char *before)
{
	char address[VF_RBD_ADDRESS_MAX];
	int err;

	snprintf(address, sizeof(address), "%s", before);
	err = rados_blocklist_add(image->cluster, address, 0);
	return err ? err : rados_wait_for_latest_osdmap(image->cluster);
}

/* Otherwise we would wait for the previous client's lock until its watch has timed out. */
static void vf_rbd_break_lock(struct vf_rbd_image *image, const char *before)
{
	rbd_lock_mode_t mode;
	char *owners[VF_RBD_OWNER_MAX] = { NULL };
	size_t count = VF_RBD_OWNER_MAX;

	if (rbd_lock_get_owners(image->image, &mode, owners, &count))
		return; /* the lock is free, or the image has none */
	for (size_t i = 0; i < count; i++) {
		if (strcmp(vf_rbd_plain_address(owners[i]), before) == 0)
			rbd_lock_break(image->image, mode, owners[i]); /* on an error we wait for it */
	}
	rbd_lock_get_owners_cleanup(owners, count);
}

static int vf_rbd_enter(struct vf_rbd_image *image, const struct vf_rbd_settings *settings)
{
	bool exists = false;
	int err;

	image->reached = VF_RBD_POOL;
	err = rados_ioctx_create(image->cluster, settings->pool, &image->pool);
	if (err)
		return err;
	if (!vf_rbd_given(settings->name_space))
		return 0;
	image->reached = VF_RBD_NAMESPACE;
	err = rbd_namespace_exists(image->pool, settings->name_space, &exists);
	/* A user with access to one namespace only cannot list them. */
	if (err != -EPERM && (err || !exists))
		return err ? err : -ENOENT;
	rados_ioctx_set_namespace(image->pool, settings->name_space);
	return 0;
}

/* What no other image has, also one that is made under its name: the ids of cluster, pool and image. "" for an image of the first
 * format, which has none. */
static void vf_rbd_identity(const struct vf_rbd_image *image, char text[static VF_RBD_IDENTITY_MAX])
{
	char fsid[VF_RBD_FSID_BYTES] = "";
	char id[VF_RBD_ID_MAX];

	text[0] = '\0';
	if (rados_cluster_fsid(image->cluster, fsid, sizeof(fsid)) < 0 || rbd_get_id(image->image, id, sizeof(id)))
		return;
	snprintf(text, VF_RBD_IDENTITY_MAX, "%s/%lld/%s", fsid, (long long)rados_ioctx_get_id(image->pool), id);
}

static int vf_rbd_is_other(const struct vf_rbd_image *image, const char *wanted)
{
	char found[VF_RBD_IDENTITY_MAX];

	vf_rbd_identity(image, found);
	return vf_rbd_given(wanted) && found[0] && strcmp(found, wanted) != 0;
}

int vf_rbd_image_open(struct vf_rbd_image *image, const struct vf_rbd_settings *settings, const char *before, int *fenced)
{
	int err;

	*image = (struct vf_rbd_image){ .reached = VF_RBD_CLIENT };
	*fenced = VF_RBD_NOBODY;
	err = vf_rbd_configure(image, settings);
	if (err)
		return err;
	image->reached = VF_RBD_CONNECT;
	err = rados_connect(image->cluster);
	if (err)
		return err;
	before = vf_rbd_address_here(image, before);
	if (before) {
		image->reached = VF_RBD_FENCE;
		*fenced = vf_rbd_fence(image, before);
		if (*fenced && *fenced != -EACCES && *fenced != -EPERM)
			return *fenced; /* a retry does not bring those rights */
	}
	err = vf_rbd_enter(image, settings);
	if (err)
		return err;
	image->reached = VF_RBD_IMAGE;
	err = (settings->read_only ? rbd_open_read_only : rbd_open)(image->pool, settings->image, &image->image, NULL);
	if (err)
		return err;
	if (vf_rbd_is_other(image, settings->wanted)) {
		rbd_close(image->image);
		return -ESTALE;
	}
	if (vf_rbd_given(settings->snap)) {
		image->reached = VF_RBD_SNAP;
		err = rbd_snap_set(image->image, settings->snap);
		if (err)
			return err;
	} else if (*fenced == 0 && !settings->read_only) {
		vf_rbd_break_lock(image, before);
	}
	image->reached = VF_RBD_OPEN;
	return 0;
}

void vf_rbd_image_close(struct vf_rbd_image *image)
{
	if (image->reached > VF_RBD_IMAGE)
		rbd_close(image->image);
	if (image->reached > VF_RBD_POOL)
		rados_ioctx_destroy(image->pool);
	if (image->reached > VF_RBD_CLIENT)
		rados_shutdown(image->cluster);
	*image = (struct vf_rbd_image){ .reached = VF_RBD_CLIENT };
}

int vf_rbd_option(const struct vf_rbd_image *image, const char *name, char *value, size_t size)
{
	return image->reached > VF_RBD_CLIENT ? rados_conf_get(image->cluster, name, value, size) : -ENOENT;
}

/* Read librbd's cache mode for this image, which may have a configuration of its own. */
static int vf_rbd_about_cache(const struct vf_rbd_image *image, struct vf_rbd_about *about)
{
	rbd_config_option_t *options = calloc(VF_RBD_OPTION_MAX, sizeof(*options));
	int max = VF_RBD_OPTION_MAX;
	int err;

	if (!options)
		return -ENOMEM;
	about->caches = about->early_writes = 1; /* the default */
	err = rbd_config_image_list(image->image, options, &max);
	if (err == 0) {
		for (int i = 0; i < max; i++) {
			if (strcmp(options[i].name, "rbd_cache") == 0)
				about->caches = strcmp(options[i].value, "false") != 0;
			else if (strcmp(options[i].name, "rbd_cache_policy") == 0)
				about->early_writes = strcmp(options[i].value, "writethrough") != 0;
		}
		rbd_config_image_list_cleanup(options, max);
	}
	free(options);
	about->early_writes &= about->caches;
	return err;
}

int vf_rbd_about(const struct vf_rbd_image *image, struct vf_rbd_about *about)
{
	rbd_image_info_t info;
	uint64_t features = 0;
	int err = rbd_stat(image->image, &info, sizeof(info));

	*about = (struct vf_rbd_about){ .size_bytes = 0 };
	if (err)
		return err;
	vf_rbd_identity(image, about->identity);
	about->size_bytes = info.size;
	about->object_bytes = info.obj_size;
	err = rbd_get_features(image->image, &features);
	if (err)
		return err;
	about->exclusive_lock = (features & RBD_FEATURE_EXCLUSIVE_LOCK) != 0;
	err = vf_rbd_about_cache(image, about);
	if (err)
		return err;
	err = rbd_get_stripe_unit(image->image, &about->stripe_unit_bytes);
	return err ? err : rbd_get_stripe_count(image->image, &about->stripe_count);
}

/* Append a name; 0 when there is no room for it and the end. */
static int vf_rbd_put_name(const char *name, char *names, size_t size, size_t *used)
{
	size_t len = strlen(name) + 1;

	if (*used + len + 1 > size)
		return 0;
	memcpy(names + *used, name, len);
	*used += len;
	return 1;
}

static int vf_rbd_image_names(const struct vf_rbd_image *image, char *names, size_t size, size_t *used)
{
	rbd_image_spec_t *specs = calloc(VF_RBD_IMAGE_MAX, sizeof(*specs));
	size_t count = VF_RBD_IMAGE_MAX;
	int err;

	if (!specs)
		return -ENOMEM;
	err = rbd_list2(image->pool, specs, &count);
	if (err >= 0) {
		for (size_t i = 0; i < count; i++) {
			if (!vf_rbd_put_name(specs[i].name, names, size, used))
				break;
		}
		rbd_image_spec_list_cleanup(specs, count);
	}
	free(specs);
	return err < 0 ? err : 0;
}

static int vf_rbd_snap_names(const struct vf_rbd_image *image, char *names, size_t size, size_t *used)
{
	rbd_snap_info_t snaps[VF_RBD_SNAP_MAX];
	int max = VF_RBD_SNAP_MAX;
	int count = rbd_snap_list(image->image, snaps, &max);

	if (count < 0)
		return count;
	for (int i = 0; i < count; i++) {
		if (!vf_rbd_put_name(snaps[i].name, names, size, used))
			break;
	}
	rbd_snap_list_end(snaps);
	return 0;
}

int vf_rbd_names(const struct vf_rbd_image *image, char *names, size_t size)
{
	size_t used = 0;
	size_t room = size - 1;
	int err;

	memset(names, 0, size);
	switch (image->reached) {
	case VF_RBD_POOL:
		err = rados_pool_list(image->cluster, names, size);
		return err < 0 ? err : (err > (int)size ? (int)size : err);
	case VF_RBD_NAMESPACE:
		err = rbd_namespace_list(image->pool, names, &room);
		return err < 0 ? err : (int)room;
	case VF_RBD_IMAGE:
		err = vf_rbd_image_names(image, names, size, &used);
		return err ? err : (int)used;
	case VF_RBD_SNAP:
		err = vf_rbd_snap_names(image, names, size, &used);
		return err ? err : (int)used;
	default:
		return 0;
	}
}
