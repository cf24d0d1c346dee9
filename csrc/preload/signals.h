/* SPDX-License-Identifier: Apache-2.0
 *
 * Keeps signals away from a thread that has a lock: a handler may use the disk, and would wait for that lock for ever.
 */
#ifndef VF_SIGNALS_H
#define VF_SIGNALS_H

#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* By system calls: the program may have replaced the functions. Signals of the kernel's own (SIGSEGV) are not kept away. */
static inline void vf_signals_block(uint64_t *old_mask)
{
	uint64_t all = ~(uint64_t)0;

	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, old_mask, sizeof(all));
}

/* Keeps errno. */
static inline void vf_signals_restore(const uint64_t *old_mask)
{
	int kept_errno = errno;

	syscall(SYS_rt_sigprocmask, SIG_SETMASK, old_mask, NULL, sizeof(*old_mask));
	errno = kept_errno;
}

#endif
