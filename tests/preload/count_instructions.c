/* SPDX-License-Identifier: Apache-2.0
 *
 * Counts the instructions that the preload library takes for a request of an AIO context: a child reads 4 KiB at a time, and its
 * parent executes it step by step.
 *
 * count_instructions BATCH: so many requests in each io_submit(), and events in each io_getevents(); 32 are in flight
 * Prints the instructions of one request. Ends with 2 when something fails, 3 for wrong use.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define DEPTH 32
#define WARM_UP 1024 /* requests */
#define COUNTED 256
#define BLOCK_BYTES 4096

typedef int setup_call(int count, void **context);
typedef int submit_call(void *context, long count, struct iocb **iocbs);
typedef int events_call(void *context, long min, long count, struct io_event *events, struct timespec *timeout);

static submit_call *submit;
static events_call *get_events;
static struct iocb iocbs[DEPTH];
static void *context;

static void fail(const char *what)
{
	perror(what);
	exit(2);
}

static void *find(const char *name)
{
	void *at = dlsym(RTLD_DEFAULT, name);

	if (!at)
		fail(name);
	return at;
}

static void send(struct io_event *events, long count)
{
	struct iocb *again[DEPTH];

	for (long i = 0; i < count; i++)
		again[i] = (struct iocb *)(uintptr_t)events[i].obj;
	if (submit(context, count, again) != count)
		fail("io_submit");
}

static void run(long requests, long batch)
{
	struct io_event events[DEPTH];

	for (long done = 0; done < requests; done += batch) {
		if (get_events(context, batch, batch, events, NULL) != batch || events[0].res != BLOCK_BYTES)
			fail("io_getevents");
		send(events, batch);
	}
}

static void child(long batch)
{
	struct io_event all[DEPTH];
	int fd = open(getenv("VDUSEFAST_ATTACH"), O_RDWR | O_DIRECT);
	uint8_t *memory = mmap(NULL, DEPTH * BLOCK_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (fd < 0 || memory == MAP_FAILED || ((setup_call *)find("io_setup"))(DEPTH, &context))
		fail("the disk");
	for (int i = 0; i < DEPTH; i++) {
		iocbs[i].aio_fildes = (uint32_t)fd;
		iocbs[i].aio_lio_opcode = IOCB_CMD_PREAD;
		iocbs[i].aio_buf = (uintptr_t)memory + (uint64_t)i * BLOCK_BYTES;
		iocbs[i].aio_nbytes = BLOCK_BYTES;
		iocbs[i].aio_offset = (int64_t)i * BLOCK_BYTES;
		all[i].obj = (uintptr_t)&iocbs[i];
	}
	send(all, DEPTH);
	run(WARM_UP, batch);
	if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) < 0)
		fail("ptrace");
	raise(SIGSTOP);
	run(COUNTED, batch);
	raise(SIGSTOP);
	_exit(0);
}

/* The code of the library that has a function. */
static void code_of(const void *function, uintptr_t *first, uintptr_t *end)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	char line[512];

	while (maps && fgets(line, sizeof(line), maps))
		if (sscanf(line, "%lx-%lx", first, end) == 2 && (uintptr_t)function >= *first && (uintptr_t)function < *end) {
			fclose(maps);
			return;
		}
	fail("the library's code");
}

int main(int argc, char **argv)
{
	uintptr_t first, end;
	uint64_t count = 0;
	int status, stops = 0;
	long batch = argc == 2 ? atol(argv[1]) : 0;

	if (batch < 1 || DEPTH % batch)
		return 3;
	submit = (submit_call *)find("io_submit");
	get_events = (events_call *)find("io_getevents");
	code_of((const void *)submit, &first, &end);
	pid_t pid = fork();
	if (pid == 0)
		child(batch);
	while (waitpid(pid, &status, 0) == pid && WIFSTOPPED(status)) {
		struct user_regs_struct registers;

		stops += WSTOPSIG(status) == SIGSTOP;
		if (stops == 2)
			break;
		if (ptrace(PTRACE_GETREGS, pid, NULL, &registers) < 0)
			fail("ptrace");
		count += registers.rip >= first && registers.rip < end;
		if (ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL) < 0)
			fail("ptrace");
	}
	kill(pid, SIGKILL);
	if (stops == 2)
		waitpid(pid, &status, 0);
	if (stops != 2)
		return 2;
	printf("%.1f\n", (double)count / COUNTED);
	return 0;
}
