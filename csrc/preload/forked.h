/* SPDX-License-Identifier: Apache-2.0
 *
 * Whether this process is a child that nobody has prepared: fork() runs handlers in it, the system call clone and _Fork() run
 * none. What belongs to the parent (users, the connection, registered memory) must not be used by a child.
 */
#ifndef VF_FORKED_H
#define VF_FORKED_H

#include <stdint.h>

#include "base/barrier.h"

extern uint32_t vf_fork_count; /* differs between a process and its parent */
extern uint32_t *vf_fork_mark; /* the kernel makes it 0 in a child */

/* Have this run in such a child, before it uses the disk. */
void vf_fork_when_unprepared(void (*prepare)(void));

/* Run them. */
void vf_fork_prepare_now(void);

/* To be called before anything of the parent's could be used. One load, in a process that is prepared. */
static inline void vf_fork_check(void)
{
	if (vf_unlikely(vf_peek_u32(vf_fork_mark) != 1u))
		vf_fork_prepare_now();
}

#endif
