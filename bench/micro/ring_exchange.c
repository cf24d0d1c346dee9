/* SPDX-License-Identifier: Apache-2.0
 *
 * The bare ring exchange: what two CPUs can pass between them through a split virtqueue when nobody does anything else.
 * Two processes, a CPU each; requests of three descriptors (header, data, status), written anew each time as a driver
 * does; the device side reads descriptors and header and writes the status byte. Both sides spin. One JSON line.
 *
 *   ring_exchange [-t seconds] [-d iodepth] [-c driver_cpu] [-C device_cpu] [-q queue_size]
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include "barrier.h"
#include "vring.h"

#define DEPTH_MAX 1024u
#define WARM_UP_NS 200000000ull

struct header {
	uint32_t type;
	uint32_t ioprio;
	uint64_t sector;
};

struct slot { /* a cache line, as the driver of vdusefast lays it out */
	struct header header;
	uint8_t reserved[16];
	uint8_t status;
	uint8_t pad[31];
};

struct shared {
	_Alignas(4096) struct vf_desc desc[VF_QUEUE_SIZE_MAX];
	_Alignas(4096) uint16_t avail_flags;
	uint16_t avail_idx;
	uint16_t avail_ring[VF_QUEUE_SIZE_MAX];
	_Alignas(4096) uint16_t used_flags;
	uint16_t used_idx;
	struct vf_used_elem used_ring[VF_QUEUE_SIZE_MAX];
	_Alignas(4096) struct slot slots[DEPTH_MAX];
	_Alignas(64) uint32_t stop;
	uint64_t sectors; /* sum, so that reading the header is not optimised away */
};

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static int pin(int cpu)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	return sched_setaffinity(0, sizeof(set), &set);
}

static void device(struct shared *s, uint16_t mask)
{
	uint16_t last = 0;
	uint64_t sectors = 0;
	while (!vf_load_relaxed_u32(&s->stop)) {
		uint16_t avail = vf_load_acquire_u16(&s->avail_idx);
		if (avail == last) {
			vf_cpu_relax();
			continue;
		}
		while (last != avail) {
			uint16_t head = s->avail_ring[last & mask];
			struct vf_desc header = s->desc[head], data = s->desc[header.next], status = s->desc[data.next];
			sectors += ((const struct header *)(uintptr_t)header.addr)->sector + data.len;
			*(uint8_t *)(uintptr_t)status.addr = 0;
			s->used_ring[last & mask] = (struct vf_used_elem){ head, data.len + 1 };
			last++;
		}
		vf_store_release_u16(&s->used_idx, last);
	}
	s->sectors = sectors;
}

static void submit(struct shared *s, uint16_t slot, uint16_t mask, uint16_t *avail, uint64_t sector)
{
	struct slot *line = &s->slots[slot];
	uint16_t head = (uint16_t)(3 * slot);
	line->header = (struct header){ 0, 0, sector };
	line->status = 0xff;
	s->desc[head] = (struct vf_desc){ (uintptr_t)&line->header, 16, VF_DESC_F_NEXT, (uint16_t)(head + 1) };
	s->desc[head + 1] = (struct vf_desc){ 0x100000000ull + 4096ull * slot, 4096, VF_DESC_F_NEXT | VF_DESC_F_WRITE,
					      (uint16_t)(head + 2) };
	s->desc[head + 2] = (struct vf_desc){ (uintptr_t)&line->status, 1, VF_DESC_F_WRITE, 0 };
	s->avail_ring[*avail & mask] = head;
	(*avail)++;
}

/* Returns the requests finished within the measured time, or 0 when a status byte was wrong. */
static uint64_t driver(struct shared *s, uint16_t mask, uint32_t depth, uint64_t run_ns, uint64_t *measured_ns)
{
	uint16_t avail = 0, last = 0;
	uint64_t sector = 0, done = 0, start = now_ns(), begin = 0;
	for (uint32_t i = 0; i < depth; i++)
		submit(s, (uint16_t)i, mask, &avail, sector += 8);
	vf_store_release_u16(&s->avail_idx, avail);
	for (uint32_t turn = 0;; turn++) {
		uint16_t used = vf_load_acquire_u16(&s->used_idx);
		if ((turn & 1023u) == 0) {
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
		if (used == last) {
			vf_cpu_relax();
			continue;
		}
		while (last != used) {
			uint16_t slot = (uint16_t)(s->used_ring[last & mask].id / 3);
			if (s->slots[slot].status != 0)
				return 0;
			submit(s, slot, mask, &avail, sector += 8);
			last++;
			done++;
		}
		vf_store_release_u16(&s->avail_idx, avail);
	}
}

int main(int argc, char **argv)
{
	double seconds = 2;
	uint32_t depth = 32, size = 256;
	int driver_cpu = 1, device_cpu = 0, option;
	while ((option = getopt(argc, argv, "t:d:c:C:q:")) != -1) {
		switch (option) {
		case 't': seconds = atof(optarg); break;
		case 'd': depth = (uint32_t)atoi(optarg); break;
		case 'c': driver_cpu = atoi(optarg); break;
		case 'C': device_cpu = atoi(optarg); break;
		case 'q': size = (uint32_t)atoi(optarg); break;
		default: return 2;
		}
	}
	if (size < 4 || size > VF_QUEUE_SIZE_MAX || (size & (size - 1)) || !depth || depth > DEPTH_MAX || 3 * depth > size) {
		fprintf(stderr, "ring_exchange: the queue size is a power of two, three times the iodepth or more\n");
		return 2;
	}
	struct shared *s = mmap(NULL, sizeof(*s), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (s == MAP_FAILED)
		return perror("ring_exchange: mmap"), 1;
	pid_t child = fork();
	if (child < 0)
		return perror("ring_exchange: fork"), 1;
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (pin(device_cpu))
			_exit(1);
		device(s, (uint16_t)(size - 1));
		_exit(0);
	}
	uint64_t measured_ns = 1, done = 0;
	if (pin(driver_cpu) == 0)
		done = driver(s, (uint16_t)(size - 1), depth, (uint64_t)(seconds * 1e9), &measured_ns);
	else
		perror("ring_exchange: sched_setaffinity");
	vf_store_relaxed_u32(&s->stop, 1);
	waitpid(child, NULL, 0);
	printf("{\"name\": \"ring_exchange\", \"iodepth\": %u, \"driver_cpu\": %d, \"device_cpu\": %d, \"requests\": %llu, "
	       "\"seconds\": %.6f, \"iops\": %.0f}\n",
	       depth, driver_cpu, device_cpu, (unsigned long long)done, (double)measured_ns / 1e9,
	       (double)done * 1e9 / (double)measured_ns);
	return done ? 0 : 1;
}
