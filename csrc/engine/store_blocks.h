/* SPDX-License-Identifier: Apache-2.0
 *
 * Transfers that the store does not support as they are: memory that is misaligned for O_DIRECT, and requests for parts of
 * blocks. A device keeps the block size that its driver was shown. If the store supports larger blocks only (`emulates`), a
 * part of a block is written by reading, changing and writing the whole block.
 *
 * That writes back bytes that the request does not mention. So nothing else may write to the block in between, or a write that
 * was acknowledged meanwhile would be undone. Each queue is served by a process of its own. So, while a store emulates,
 *
 *  - a change of a part of a block locks that block exclusively, from its read to the end of its write;
 *  - writes, discards and zeroes of whole blocks lock them shared: two of these may overlap, as on any disk;
 *  - reads lock nothing, because the bytes written back are unchanged.
 *
 * The locks are record locks (fcntl, F_SETLKW) on the file of the shared pages. They are unrelated to its contents: one byte
 * stands for a block. They belong to the process, also through a descriptor that all workers have inherited. The kernel
 * releases them when the process ends, and by then its writing system call has ended. So all writes of such a store are
 * blocking system calls. None goes to an io_uring, whose requests outlive the process and its locks, and would not be
 * excluded from the process's own. A process has at most one of these locks at a time, so processes cannot deadlock.
 *
 * If a worker dies while it holds a lock, the block is as before or after its write, as on a disk. The replay of its request
 * from the log locks the block again. A server that adopts the device starts after the previous server's last write.
 */
#ifndef VF_STORE_BLOCKS_H
#define VF_STORE_BLOCKS_H

#include "engine/store.h"

/* Carry out a read or a write of any memory, offset and length through the bounce buffer. 0 or -errno. */
int vf_blocks_rw(struct vf_store *store, struct vf_req *req);

/* For a store that emulates: apply `whole` to the whole blocks of a range. Zero the parts of blocks at its ends, or leave them for
 * a discard. 0 or -errno. */
int vf_blocks_range(struct vf_store *store, struct vf_req *req, int (*whole)(struct vf_store *, struct vf_req *));

/* Of store.c: a transfer that the store takes as it is, one of len bytes out of the bounce buffer, and zeroes that are written
 * out. 0 or -errno. */
int vf_store_rw(struct vf_store *store, struct vf_req *req);
int vf_bounce_write(struct vf_store *store, uint64_t offset_bytes, size_t len);
int vf_store_write_zero_pages(struct vf_store *store, struct vf_req *req);

#endif
