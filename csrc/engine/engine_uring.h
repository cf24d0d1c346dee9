/* SPDX-License-Identifier: Apache-2.0
 *
 * The functions of the io_uring engine, for the cached engine, which uses the ring only for data not in the page cache.
 */
#ifndef VF_ENGINE_URING_H
#define VF_ENGINE_URING_H

#include "engine/engine.h"

int vf_uring_open(struct vf_engine *engine, uint32_t slot_count);
int vf_uring_submit(struct vf_engine *engine, struct vf_req *req);
void vf_uring_flush(struct vf_engine *engine);
uint32_t vf_uring_reap(struct vf_engine *engine, struct vf_req **done, uint32_t max);
void vf_uring_wait(struct vf_engine *engine);
int vf_uring_sleep(struct vf_engine *engine, const int *fds, uint32_t count, int timeout_ms);
void vf_uring_close(struct vf_engine *engine);

#endif
