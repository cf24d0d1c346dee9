/* SPDX-License-Identifier: Apache-2.0
 *
 * A load on the disk of $VDUSEFAST_ATTACH through csrc/preload/disk.h, without the interception: processes, each with
 * threads, each a user with a slice of the disk of its own. A thread writes blocks that name their offset and generation,
 * reads them, and checks every byte. Each block is one of: never written here, known, or unknown (its write was cut off by the
 * end of the program).
 *
 * disk_load PROCESSES THREADS DEPTH BLOCK_BYTES BLOCKS SECONDS direct|copied FIRST_SLICE
 * Ends with 0, 1 for wrong data, 2 for an I/O error, 3 for wrong use.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "preload/disk.h"

struct request {
	struct vf_disk_io io;
	struct iovec iov[2];
	struct worker *worker;
	uint8_t *data;
	uint64_t block;
	uint64_t generation;
	bool busy;
};

struct worker {
	pthread_t thread;
	struct request *requests;
	uint64_t *known; /* generation of each block; 0: never written here */
	bool *block_busy;
	uint64_t slice; /* first byte */
	uint64_t random;
	uint64_t generation;
	uint64_t ended, flushes;
	uint32_t busy_count;
	int verdict;
};

static uint32_t depth, block_bytes;
static uint64_t block_count;
static double seconds;
static bool direct;

static double now_s(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static uint64_t next_random(struct worker *w)
{
	w->random ^= w->random << 13;
	w->random ^= w->random >> 7;
	w->random ^= w->random << 17;
	return w->random;
}

static uint64_t word_of(uint64_t offset, uint64_t generation, uint64_t i)
{
	return (offset + 1u) * 0x9e3779b97f4a7c15ull + generation * 0xc2b2ae3d27d4eb4full + i;
}

static void fill(const struct request *r)
{
	uint64_t *words = (uint64_t *)(void *)r->data;
	for (uint64_t i = 0; i < block_bytes / 8u; i++)
		words[i] = word_of(r->io.offset_bytes, r->generation, i);
}

static void finished(struct vf_disk_io *io)
{
	struct request *r = (struct request *)(void *)io;
	struct worker *w = r->worker;

	w->ended++;
	w->busy_count--;
	r->busy = false;
	if (io->op == VF_DISK_FLUSH) {
		w->flushes++;
	} else {
		w->block_busy[r->block] = false;
	}
	if (io->result != (int64_t)io->length_bytes) {
		fprintf(stderr, "operation %d at %llu: %lld\n", io->op, (unsigned long long)io->offset_bytes, (long long)io->result);
		w->verdict = w->verdict ? w->verdict : 2;
		return;
	}
	if (io->op == VF_DISK_WRITE)
		w->known[r->block] = r->generation;
	if (io->op != VF_DISK_READ || w->known[r->block] == 0)
		return;
	const uint64_t *words = (const uint64_t *)(const void *)r->data;
	for (uint64_t i = 0; i < block_bytes / 8u; i++)
		if (words[i] != word_of(io->offset_bytes, w->known[r->block], i)) {
			fprintf(stderr, "wrong data at %llu, word %llu: %llx where generation %llu has %llx\n",
				(unsigned long long)io->offset_bytes, (unsigned long long)i, (unsigned long long)words[i],
				(unsigned long long)w->known[r->block],
				(unsigned long long)word_of(io->offset_bytes, w->known[r->block], i));
			w->verdict = 1;
			return;
		}
}

static void *allocate(size_t length)
{
	if (!direct)
		return aligned_alloc(4096, length);
	int fd = memfd_create("disk_load", MFD_CLOEXEC);
	if (fd < 0 || ftruncate(fd, (off_t)length))
		return NULL;
	void *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (at == MAP_FAILED)
		return NULL;
	vf_disk_memory_add(at, length, fd, 0);
	return at;
}

static void start(struct worker *w, struct vf_disk_user *user, struct request *r)
{
	uint64_t dice = next_random(w) % 100u;

	r->io = (struct vf_disk_io){ .done = finished };
	if (dice == 0) {
		r->io.op = VF_DISK_FLUSH;
	} else {
		r->block = next_random(w) % block_count;
		if (w->block_busy[r->block])
			return;
		w->block_busy[r->block] = true;
		r->io.op = dice < 50 ? VF_DISK_READ : VF_DISK_WRITE;
		r->io.offset_bytes = w->slice + r->block * block_bytes;
		r->io.length_bytes = block_bytes;
		r->iov[0] = (struct iovec){ r->data, block_bytes };
		r->io.iov = r->iov;
		r->io.iov_count = 1;
		if (dice % 2 && block_bytes > 512) {
			r->iov[0].iov_len = 512;
			r->iov[1] = (struct iovec){ r->data + 512, block_bytes - 512u };
			r->io.iov_count = 2;
		}
		if (r->io.op == VF_DISK_WRITE) {
			r->generation = ++w->generation;
			fill(r);
		} else {
			memset(r->data, 0xa5, block_bytes);
		}
	}
	r->busy = true;
	w->busy_count++;
	if (vf_disk_submit(user, &r->io)) {
		w->verdict = 2;
		r->busy = false;
		w->busy_count--;
	}
}

static void *work(void *argument)
{
	struct worker *w = argument;
	struct vf_disk_user *user = vf_disk_user_new();
	double end_s = now_s() + seconds;
	uint8_t *data = allocate((size_t)depth * block_bytes);

	if (!user || !data) {
		fprintf(stderr, "no user, or no memory: %s\n", strerror(errno));
		w->verdict = 2;
		return NULL;
	}
	w->requests = calloc(depth, sizeof(*w->requests));
	w->known = calloc(block_count, sizeof(*w->known));
	w->block_busy = calloc(block_count, sizeof(*w->block_busy));
	for (uint32_t i = 0; i < depth; i++) {
		w->requests[i].worker = w;
		w->requests[i].data = data + (size_t)i * block_bytes;
	}
	while (now_s() < end_s && !w->verdict) {
		for (uint32_t i = 0; i < depth; i++)
			if (!w->requests[i].busy)
				start(w, user, &w->requests[i]);
		vf_disk_publish(user);
		if (w->busy_count && vf_disk_reap(user, 1, depth, -1) == 0 && w->busy_count)
			w->verdict = 2; /* a wait without a limit ends with a request */
	}
	while (w->busy_count && vf_disk_reap(user, w->busy_count, depth, -1) > 0)
		;
	vf_disk_user_free(user);
	if (direct) {
		vf_disk_memory_remove(data, (size_t)depth * block_bytes);
		munmap(data, (size_t)depth * block_bytes);
	} else {
		free(data);
	}
	free(w->requests);
	free(w->known);
	free(w->block_busy);
	return NULL;
}

static int run(uint32_t threads, uint32_t first_slice)
{
	struct worker *workers = calloc(threads, sizeof(*workers));
	int verdict = 0;
	uint64_t ended = 0;

	for (uint32_t i = 0; i < threads; i++) {
		workers[i].slice = (first_slice + i) * block_count * block_bytes;
		workers[i].random = 88172645463325252ull + (uint64_t)getpid() * 7919u + i;
		pthread_create(&workers[i].thread, NULL, work, &workers[i]);
	}
	for (uint32_t i = 0; i < threads; i++) {
		pthread_join(workers[i].thread, NULL);
		ended += workers[i].ended;
		if (workers[i].verdict && (!verdict || workers[i].verdict < verdict))
			verdict = workers[i].verdict;
	}
	free(workers);
	printf("%llu\n", (unsigned long long)ended);
	fflush(stdout);
	return verdict;
}

int main(int argc, char **argv)
{
	if (argc != 9)
		return 3;
	uint32_t processes = (uint32_t)atoi(argv[1]), threads = (uint32_t)atoi(argv[2]);
	uint32_t first_slice = (uint32_t)atoi(argv[8]);
	depth = (uint32_t)atoi(argv[3]);
	block_bytes = (uint32_t)atoi(argv[4]);
	block_count = (uint64_t)atoll(argv[5]);
	seconds = atof(argv[6]);
	direct = strcmp(argv[7], "direct") == 0;
	const struct vf_disk_info *info = vf_disk_attach();
	if (!info || (first_slice + processes * threads) * block_count * block_bytes > info->capacity_bytes)
		return 3;
	int verdict = 0;
	for (uint32_t p = 1; p < processes; p++)
		if (fork() == 0)
			exit(run(threads, first_slice + p * threads));
	verdict = run(threads, first_slice);
	for (uint32_t p = 1; p < processes; p++) {
		int status;
		if (wait(&status) < 0 || !WIFEXITED(status))
			verdict = verdict ? verdict : 2;
		else if (WEXITSTATUS(status) && (!verdict || WEXITSTATUS(status) < verdict))
			verdict = WEXITSTATUS(status);
	}
	return verdict;
}
