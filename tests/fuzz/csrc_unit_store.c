/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "csrc_unit.h"

#define STORE_BYTES (4u << 20)

static int store_do(struct vf_store *store, enum vf_op op, struct iovec *iov, uint32_t count, uint64_t at, uint64_t len)
{
	struct vf_req req = { .op = (uint8_t)op, .unmap = at & 1u, .iov = iov, .iov_count = count, .left_bytes = len };

	req.offset_bytes = at & ~1ull;
	return vf_store_do(store, &req);
}

static void test_store(enum vf_store_kind kind, uint32_t direct_align, uint32_t granule)
{
	struct vf_store store = { .fd = memory_fd(STORE_BYTES), .kind = kind, .size_bytes = STORE_BYTES };
	size_t len = (2u << 20) + 4096u; /* more than the bounce buffer twice */
	uint8_t *out = malloc(len + 1u), *in = malloc(len + 1u);

	CHECK(out && in);
	for (size_t i = 0; i < len; i++)
		out[i] = (uint8_t)(i * 7u + i / 4096u);
	CHECK(vf_store_open(&store) == 0);
	store.direct_align = direct_align; /* misaligned memory goes by way of the bounce buffer */
	store.granule = granule; /* and so do parts of blocks */
	store.emulates = granule > 512u;
	store.lock_fd = memory_fd(0);
	struct iovec from[3] = { { out, 5 }, { out + 5, 4091 }, { out + 4096, len - 4096 } };
	struct iovec to[2] = { { in + 1, 100 }, { in + 101, len - 100 } };
	CHECK(store_do(&store, VF_OP_WRITE, from, 3, 512, len) == 0);
	CHECK(store_do(&store, VF_OP_READ, to, 2, 512, len) == 0 && memcmp(out, in + 1, len) == 0);
	CHECK(store_do(&store, VF_OP_FLUSH, NULL, 0, 0, 0) == 0);
	CHECK(store_do(&store, VF_OP_DISCARD, NULL, 0, 512, 512) == 0);
	CHECK(store_do(&store, VF_OP_WRITE_ZEROES, NULL, 0, 1024, 512) == 0);
	CHECK(store_do(&store, VF_OP_WRITE_ZEROES, NULL, 0, 1536 | 1, 2u << 20) == 0);
	store.no_punch_hole = store.no_zero_range = 1;
	CHECK(store_do(&store, VF_OP_WRITE_ZEROES, NULL, 0, 1, 3u << 20) == 0);
	to[0] = (struct iovec){ in, len };
	CHECK(store_do(&store, VF_OP_READ, to, 1, 0, len) == 0);
	for (size_t i = 0; i < len; i++)
		CHECK(in[i] == 0);
	if (kind == VF_STORE_FILE) {
		to[0] = (struct iovec){ in, len };
		CHECK(store_do(&store, VF_OP_READ, to, 1, STORE_BYTES - 512, 1024) == -EIO); /* beyond the end */
	}
	CHECK(store_do(&store, VF_OP_GET_ID, NULL, 0, 0, 0) == -EINVAL);
	vf_store_close(&store);
	vf_store_close(&store);
	close(store.lock_fd);
	close(store.fd);
	free(out);
	free(in);
}

static void test_engine(const struct vf_engine_ops *ops)
{
	struct vf_engine engine;
	struct vf_store store = { .fd = memory_fd(65536), .kind = VF_STORE_FILE, .size_bytes = 65536 };
	uint8_t data[16][512];
	struct iovec iov[16];
	struct vf_req reqs[16], *done[16];
	uint32_t finished = 0;

	if (vf_engine_open(&engine, ops, &store, 8) != 0) { /* io_uring is forbidden here */
		close(store.fd);
		return;
	}
	memset(data, 0x5a, sizeof(data));
	for (uint32_t i = 0; i < 16u; i++) {
		iov[i] = (struct iovec){ data[i], 512 };
		reqs[i] = (struct vf_req){ .op = i % 3u ? VF_OP_WRITE : VF_OP_FLUSH, .iov = &iov[i], .iov_count = 1 };
		reqs[i].left_bytes = i % 3u ? 512u : 0u;
		reqs[i].offset_bytes = 512u * i;
		finished += (uint32_t)engine.ops->submit(&engine, &reqs[i]);
	}
	while (engine.inflight_count) {
		engine.ops->flush(&engine);
		uint32_t count = engine.ops->reap(&engine, done, 16);
		finished += count;
		if (!count)
			engine.ops->wait(&engine);
	}
	CHECK(finished == 16);
	for (uint32_t i = 0; i < 16u; i++)
		CHECK(reqs[i].result == 0 && reqs[i].left_bytes == 0);
	vf_engine_close(&engine);
	vf_engine_close(&engine);
	close(store.fd);
}

void test_stores(void)
{
	test_store(VF_STORE_FILE, 0, 0);
	test_store(VF_STORE_FILE, 512, 512);
	test_store(VF_STORE_FILE, 4096, 4096);
	test_store(VF_STORE_FILE, 65536, 65536);
	test_store(VF_STORE_FILE, 0, 4096);
	test_store(VF_STORE_MEMORY, 0, 0);
	test_engine(&vf_engine_sync);
	test_engine(&vf_engine_uring);
}
