/* SPDX-License-Identifier: Apache-2.0
 *
 * A full fence in other processes, where one side of a pair runs very often and the other hardly ever: the first needs a
 * fence of the compiler only, the second has the kernel do the rest. A process joins first.
 */
#ifndef VF_MEMBARRIER_H
#define VF_MEMBARRIER_H

#include <linux/membarrier.h>
#include <stdbool.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Have the fences below reach all threads of this process, also of others. false where the kernel cannot (before 4.16). */
static inline bool vf_membarrier_join(void)
{
	return syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0) == 0;
}

/* A full fence here, and in each running thread of all processes that have joined. */
static inline bool vf_membarrier(void)
{
	return syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL_EXPEDITED, 0, 0) == 0;
}

#endif
