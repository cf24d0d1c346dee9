/* SPDX-License-Identifier: Apache-2.0
 *
 * A lock of the threads of one process: three words of code when nobody waits. It is not for memory that processes share.
 */
#ifndef VF_LOCK_H
#define VF_LOCK_H

#include <linux/futex.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/barrier.h"

enum { VF_LOCK_FREE, VF_LOCK_HELD, VF_LOCK_AWAITED };

static inline void vf_lock_take(uint32_t *lock)
{
	if (vf_likely(vf_exchange_if_u32(lock, VF_LOCK_FREE, VF_LOCK_HELD)))
		return;
	while (!vf_exchange_if_u32(lock, VF_LOCK_FREE, VF_LOCK_AWAITED)) {
		vf_exchange_if_u32(lock, VF_LOCK_HELD, VF_LOCK_AWAITED);
		syscall(SYS_futex, lock, FUTEX_WAIT_PRIVATE, VF_LOCK_AWAITED, NULL);
	}
}

static inline void vf_lock_leave(uint32_t *lock)
{
	if (vf_likely(vf_exchange_if_u32(lock, VF_LOCK_HELD, VF_LOCK_FREE)))
		return;
	vf_store_release_u32(lock, VF_LOCK_FREE);
	syscall(SYS_futex, lock, FUTEX_WAKE_PRIVATE, 1);
}

#endif
