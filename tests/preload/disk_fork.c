/* SPDX-License-Identifier: Apache-2.0
 *
 * A user of a disk across fork(): the child's copy of it is refused, and the child attaches by itself. With an argument the
 * same of clone(), which runs no handlers. Ends with 0, else with the number of the step that failed.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "preload/disk.h"

#define BLOCK 4096u

static uint8_t data[BLOCK];
static struct iovec part = { data, BLOCK };

static void finished(struct vf_disk_io *io)
{
	(void)io;
}

static int transfer(struct vf_disk_user *user, enum vf_disk_op op, uint64_t offset_bytes)
{
	struct vf_disk_io io = {
		.op = op, .iov = &part, .iov_count = 1, .offset_bytes = offset_bytes, .length_bytes = BLOCK, .done = finished
	};
	int rc = vf_disk_submit(user, &io);

	if (rc)
		return rc;
	rc = vf_disk_reap(user, 1, 1, -1);
	return rc != 1 ? -EPROTO : io.result == BLOCK ? 0 : (int)io.result;
}

static bool raw; /* by the system call, which runs no handlers */

static pid_t make_child(void)
{
	return raw ? (pid_t)syscall(SYS_clone, (long)SIGCHLD, 0L, 0L, 0L, 0L) : fork();
}

static int child_ended(pid_t child)
{
	int status;

	return child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) ? 99 : WEXITSTATUS(status);
}

static int descend(struct vf_disk_user *of_parent, int generations)
{
	struct vf_disk_user *user = vf_disk_user_new();
	if (vf_disk_reap(of_parent, 1, 1, -1) != -ESHUTDOWN || transfer(of_parent, VF_DISK_READ, 0) != -ESHUTDOWN)
		return 10;
	memset(data, 0, BLOCK);
	if (!user || transfer(user, VF_DISK_READ, 0) || data[17] != 0x5a)
		return 11;
	vf_disk_user_free(of_parent);
	memset(data, generations, BLOCK);
	if (transfer(user, VF_DISK_WRITE, (uint64_t)generations * BLOCK))
		return 12;
	pid_t child = generations > 1 ? make_child() : 0;
	if (generations > 1 && child == 0)
		_exit(descend(user, generations - 1));
	int verdict = generations > 1 ? child_ended(child) : 0;
	vf_disk_user_free(user);
	return verdict;
}

int main(int argc, char **argv)
{
	(void)argv;
	const struct vf_disk_info *info = vf_disk_attach();
	struct vf_disk_user *user = info ? vf_disk_user_new() : NULL;

	memset(data, 0x5a, BLOCK);
	if (!user || transfer(user, VF_DISK_WRITE, 0))
		return 1;
	raw = argc > 1;
	pid_t child = make_child();
	if (child == 0)
		_exit(descend(user, 3));
	int verdict = child_ended(child);
	if (verdict)
		return verdict;
	for (uint8_t generation = 1; generation <= 3; generation++)
		if (transfer(user, VF_DISK_READ, (uint64_t)generation * BLOCK) || data[17] != generation)
			return 2;
	vf_disk_user_free(user);
	return 0;
}
