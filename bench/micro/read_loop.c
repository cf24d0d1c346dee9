/* SPDX-License-Identifier: Apache-2.0
 *
 * The bare read loop: pread of one block at random offsets of a file into shared memory, one CPU, nothing else: what a
 * server that reads a file for somebody can reach at best without batching system calls. One JSON line.
 *
 *   read_loop [-t seconds] [-b block_bytes] [-c cpu] [-n buffers] FILE
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define WARM_UP_NS 200000000ull

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static uint64_t random64(uint64_t *state)
{
	uint64_t x = *state;
	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	*state = x;
	return x * 0x2545f4914f6cdd1dull;
}

/* Returns the reads within the measured time, 0 on a failure. */
static uint64_t run(int fd, uint64_t blocks, size_t block_bytes, char *memory, uint32_t buffers, uint64_t run_ns,
		    uint64_t *measured_ns)
{
	uint64_t state = 88172645463325252ull, done = 0, start = now_ns(), begin = 0;
	uint32_t buffer = 0;
	for (uint32_t turn = 0;; turn++) {
		if ((turn & 255u) == 0) {
			uint64_t now = now_ns();
			if (!begin && now - start > WARM_UP_NS) {
				begin = now;
				done = 0;
			}
			if (begin && now - begin > run_ns) {
				*measured_ns = now - begin;
				return done;
			}
		}
		uint64_t block = (uint64_t)(((unsigned __int128)random64(&state) * blocks) >> 64);
		if (pread(fd, memory + buffer * block_bytes, block_bytes, (off_t)(block * block_bytes)) != (ssize_t)block_bytes)
			return perror("read_loop: pread"), 0;
		if (++buffer == buffers)
			buffer = 0;
		done++;
	}
}

int main(int argc, char **argv)
{
	double seconds = 2;
	size_t block_bytes = 4096;
	uint32_t buffers = 32;
	int cpu = 0, option;
	while ((option = getopt(argc, argv, "t:b:c:n:")) != -1) {
		switch (option) {
		case 't': seconds = atof(optarg); break;
		case 'b': block_bytes = (size_t)atol(optarg); break;
		case 'c': cpu = atoi(optarg); break;
		case 'n': buffers = (uint32_t)atoi(optarg); break;
		default: return 2;
		}
	}
	if (optind + 1 != argc || !block_bytes || !buffers) {
		fprintf(stderr, "usage: read_loop [-t seconds] [-b block_bytes] [-c cpu] [-n buffers] FILE\n");
		return 2;
	}
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		return perror("read_loop: sched_setaffinity"), 1;
	int fd = open(argv[optind], O_RDONLY | O_CLOEXEC);
	struct stat st;
	if (fd < 0 || fstat(fd, &st))
		return perror(argv[optind]), 1;
	uint64_t blocks = (uint64_t)st.st_size / block_bytes;
	char *memory = mmap(NULL, buffers * block_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return perror("read_loop: mmap"), 1;
	if (!blocks)
		return fprintf(stderr, "read_loop: %s is smaller than a block\n", argv[optind]), 1;
	uint64_t measured_ns = 1;
	uint64_t done = run(fd, blocks, block_bytes, memory, buffers, (uint64_t)(seconds * 1e9), &measured_ns);
	printf("{\"name\": \"read_loop\", \"block_bytes\": %zu, \"cpu\": %d, \"requests\": %llu, \"seconds\": %.6f, "
	       "\"iops\": %.0f}\n",
	       block_bytes, cpu, (unsigned long long)done, (double)measured_ns / 1e9, (double)done * 1e9 / (double)measured_ns);
	close(fd);
	return done ? 0 : 1;
}
