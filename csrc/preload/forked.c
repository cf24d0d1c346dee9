/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "preload/forked.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/page.h"

#define PREPARERS_MAX 4u

enum { UNPREPARED, PREPARED, IN_PREPARATION };

static uint32_t unwiped = PREPARED; /* of a kernel before 4.14: only fork() is noticed there */
uint32_t *vf_fork_mark = &unwiped;
uint32_t vf_fork_count;

static __thread bool in_preparation __attribute__((tls_model("initial-exec")));
static void (*preparers[PREPARERS_MAX])(void);
static uint32_t preparer_count;

void vf_fork_when_unprepared(void (*prepare)(void))
{
	if (preparer_count < PREPARERS_MAX)
		preparers[preparer_count++] = prepare;
}

static void note_child(void)
{
	vf_store_relaxed_u32(&vf_fork_count, vf_peek_u32(&vf_fork_count) + 1);
}

static void after_fork_in_child(void)
{
	note_child();
	vf_store_release_u32(vf_fork_mark, PREPARED);
}

void vf_fork_prepare_now(void)
{
	int kept_errno = errno;

	if (in_preparation)
		return; /* it frees memory, by munmap() */
	if (!vf_exchange_if_u32(vf_fork_mark, UNPREPARED, IN_PREPARATION)) {
		while (vf_load_acquire_u32(vf_fork_mark) == IN_PREPARATION)
			vf_cpu_relax();
		return;
	}
	in_preparation = true;
	note_child();
	for (uint32_t i = 0; i < preparer_count; i++)
		preparers[i]();
	in_preparation = false;
	vf_store_release_u32(vf_fork_mark, PREPARED);
	errno = kept_errno;
}

/* Before all other constructors of this library: its handler is the first to run in a child. */
__attribute__((constructor(101))) static void start(void)
{
	size_t length_bytes = vf_page_bytes();
	void *at = (void *)syscall(SYS_mmap, NULL, length_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0L);

	pthread_atfork(NULL, NULL, after_fork_in_child);
	if (at == MAP_FAILED)
		return;
	if (syscall(SYS_madvise, at, length_bytes, MADV_WIPEONFORK)) {
		syscall(SYS_munmap, at, length_bytes);
		return;
	}
	vf_fork_mark = at;
	*vf_fork_mark = PREPARED;
}
