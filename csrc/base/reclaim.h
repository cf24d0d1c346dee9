/* SPDX-License-Identifier: Apache-2.0
 *
 * A process that the machine's own memory reclaim waits for. The pages that the kernel writes to our disk, to get memory
 * back, are clean only once we have answered: a worker must not wait for memory that comes from such pages. It is marked
 * as an I/O flusher, and what it touches is locked. vdusefast/host/reclaim.py does the same for the server, and tells why.
 */
#ifndef VF_RECLAIM_H
#define VF_RECLAIM_H

#include <pthread.h>

/* Have the kernel neither throttle this thread for dirty pages of other disks, nor let its allocations wait for I/O.
 * Threads and processes that it starts inherit that. 0, -EPERM (CAP_SYS_RESOURCE) or -EINVAL (before Linux 5.6). */
int vf_io_flusher_set(void);

/* Keep in memory what is, and comes to be, used of all that is mapped now. Pages that nobody uses are not made: a hundred
 * workers would have twice the memory. Raises RLIMIT_MEMLOCK where that is allowed. 0 or -errno. */
int vf_memory_lock(void);

/* Lock what has been mapped since then, too. What is mapped later is the driver's memory, and stays unlocked. 0 or -errno. */
int vf_memory_lock_used(void);

/* In a process whose memory is locked: bring the stack of a thread that was started since into memory, too. */
void vf_memory_lock_stack(pthread_t thread);

#endif
