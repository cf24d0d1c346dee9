/* SPDX-License-Identifier: Apache-2.0
 *
 * Transfers that the store does not take as they are: memory that O_DIRECT refuses, and requests for parts of blocks.
 * A device keeps the block size that its driver was shown; where the store takes larger blocks only (`emulates`), a part of
 * one is written by reading, changing and writing the whole block.
 *
 * That puts bytes back which the request does not mention, so that nothing else may write to the block in between: a write
 * that was acknowledged meanwhile would be undone. Each queue is served by a process of its own. So, while a store emulates,
 *
 *  - who changes a part of a block locks that block exclusively, from its read to the end of its write;
 *  - who writes, deallocates or zeroes whole blocks locks them shared: two of these may overlap, as on any disk;
 *  - reads lock nothing: what is put back is what was there.
 *
 * The locks are record locks (fcntl, F_SETLKW) of the shared pages' file, which mean nothing to its contents: one byte stands
 * for a block. They belong to the process, also through a descriptor that all workers have inherited, and the kernel releases
 * them when it ends; a system call that writes has ended by then. Hence all writes of such a store are system calls that block,
 * and none goes to an io_uring, whose requests outlive the process and its locks, and would not be excluded from this
 * process's own: it has at most one of these locks at a time, so that no two processes wait for each other.
 *
 * A worker that died holding a lock leaves the block as it was before or after its write, as a disk writes a block: the
 * replay of its request by the log locks them again. A server that adopts does so after the previous one's last write.
 */
#ifndef VF_STORE_BLOCKS_H
#define VF_STORE_BLOCKS_H

#include "engine/store.h"

/* Carry out a read or a write by way of the bounce buffer, whatever its memory, offset and length. 0 or -errno. */
int vf_blocks_rw(struct vf_store *store, struct vf_req *req);

/* Of a store that emulates: what `whole` does to whole blocks, and zeroes (or nothing, for a discard) to the parts of blocks at
 * the ends of the range. 0 or -errno. */
int vf_blocks_range(struct vf_store *store, struct vf_req *req, int (*whole)(struct vf_store *, struct vf_req *));

/* Of store.c: a transfer that the store takes as it is, one of len bytes out of the bounce buffer, and zeroes that are written
 * out. 0 or -errno. */
int vf_store_rw(struct vf_store *store, struct vf_req *req);
int vf_bounce_write(struct vf_store *store, uint64_t offset_bytes, size_t len);
int vf_store_write_zero_pages(struct vf_store *store, struct vf_req *req);

#endif
