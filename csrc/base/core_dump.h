/* SPDX-License-Identifier: Apache-2.0
 *
 * Keep mapped memory of a driver or a store out of the core dumps of our processes.
 */
#ifndef VF_CORE_DUMP_H
#define VF_CORE_DUMP_H

#include <stddef.h>
#include <sys/mman.h>

/* Leave a mapping out of core dumps. Async-signal-safe. No result: every kernel since 3.4 supports it. */
static inline void vf_core_exclude(void *map, size_t len_bytes)
{
	(void)madvise(map, len_bytes, MADV_DONTDUMP);
}

/* The same of a driver's memory, which a child of this process must not have either: the driver can take it from us, but
 * not from a process that we know nothing of. */
static inline void vf_core_exclude_driver(void *map, size_t len_bytes)
{
	vf_core_exclude(map, len_bytes);
	(void)madvise(map, len_bytes, MADV_DONTFORK);
}

#endif
