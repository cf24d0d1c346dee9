/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "base/reclaim.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57 /* Linux 5.6 */
#endif
#ifndef MCL_ONFAULT
#define MCL_ONFAULT 4 /* Linux 4.4 */
#endif

static int vf_memory_is_locked;

int vf_io_flusher_set(void)
{
	return prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) ? -errno : 0;
}

/* With CAP_IPC_LOCK the limit does not count; with CAP_SYS_RESOURCE alone it can be raised. */
static void vf_memlock_raise(void)
{
	struct rlimit limit = { .rlim_cur = RLIM_INFINITY, .rlim_max = RLIM_INFINITY };

	if (setrlimit(RLIMIT_MEMLOCK, &limit) == 0 || getrlimit(RLIMIT_MEMLOCK, &limit))
		return;
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_MEMLOCK, &limit); /* if that is refused, the lock returns the error */
}

int vf_memory_lock(void)
{
	vf_memlock_raise();
	return mlockall(MCL_CURRENT | MCL_ONFAULT) ? -errno : 0;
}

int vf_memory_lock_used(void)
{
	if (mlockall(MCL_CURRENT | MCL_ONFAULT))
		return -errno;
	vf_memory_is_locked = 1;
	return 0;
}

void vf_memory_lock_stack(pthread_t thread)
{
	pthread_attr_t attr;
	void *stack;
	size_t len;

	if (!vf_memory_is_locked || pthread_getattr_np(thread, &attr))
		return;
	if (pthread_attr_getstack(&attr, &stack, &len) == 0)
		(void)mlock(stack, len); /* at the limit the stack stays unlocked, as later mappings do */
	pthread_attr_destroy(&attr);
}
