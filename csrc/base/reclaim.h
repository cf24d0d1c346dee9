/* SPDX-License-Identifier: Apache-2.0
 *
 * Prepare a worker for memory reclaim, which may wait for it. When the kernel writes dirty pages to our disk to free memory,
 * they are clean only after we have completed the writes. So a worker must not wait for memory that comes from such pages: it
 * is marked as an I/O flusher, and its pages are locked. vdusefast/host/reclaim.py does the same for the server, and says why.
 */
#ifndef VF_RECLAIM_H
#define VF_RECLAIM_H

#include <pthread.h>

/* Keep the kernel from throttling this thread for dirty pages of other disks, and its allocations from waiting for I/O.
 * Threads and processes that it starts inherit that. 0, -EPERM (CAP_SYS_RESOURCE) or -EINVAL (before Linux 5.6). */
int vf_io_flusher_set(void);

/* Lock the current mappings in memory: pages in use now, and others when they are used. Unused pages are not allocated: a
 * hundred workers would need twice the memory. Raises RLIMIT_MEMLOCK where that is allowed. 0 or -errno. */
int vf_memory_lock(void);

/* Lock the mappings made since then, too. Later ones are the driver's memory, and stay unlocked. 0 or -errno. */
int vf_memory_lock_used(void);

/* In a process whose memory is locked: lock the stack of a thread that was started later, too. */
void vf_memory_lock_stack(pthread_t thread);

#endif
