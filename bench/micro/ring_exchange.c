/* SPDX-License-Identifier: Apache-2.0
 *
 * The bare ring exchange: what two CPUs can pass between them through a virtqueue when nobody does anything else.
 * Two processes, a CPU each; requests of three descriptors (header, data, status), written again each time as a driver
 * does; the device side reads descriptors and header and writes the status byte. Both sides spin. One JSON line.
 *
 *   ring_exchange [-p] [-t seconds] [-d iodepth] [-c driver_cpu] [-C device_cpu] [-q queue_size]
 *
 * The ring is a split one (VIRTIO 1.3, 2.7), or with -p a packed one (2.8), used in the order of its requests.
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

#include "base/barrier.h"
#include "ring/vring.h"

#define DEPTH_MAX 1024u
#define WARM_UP_NS 200000000ull
#define EMPTY_NS 30000000000ull /* a run in which the device side has answered nothing ends after this */

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

struct packed_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t id;
	uint16_t flags;
};

#define PACKED_AVAIL (1u << 7)
#define PACKED_USED (1u << 15)

struct shared {
	union { /* the ring is of one format or the other */
		_Alignas(4096) struct vf_desc desc[VF_QUEUE_SIZE_MAX];
		struct packed_desc packed[VF_QUEUE_SIZE_MAX];
	};
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

/* The measured time of a driver: it begins when all is warm. */
struct measurement {
	uint64_t start_ns, begin_ns, run_ns, measured_ns;
	uint64_t done; /* requests */
};

/* Whether the measured time is over and has at least one request in it. turn: how often the loop has come here; the
 * clock is read now and then. */
static inline int is_over(struct measurement *m, uint32_t turn)
{
	if (turn & 1023u)
		return 0;
	uint64_t now = now_ns();
	if (!m->begin_ns && now - m->start_ns > WARM_UP_NS) {
		m->begin_ns = now;
		m->done = 0;
	}
	m->measured_ns = now - m->begin_ns;
	return m->begin_ns && m->measured_ns > m->run_ns && (m->done || m->measured_ns > EMPTY_NS);
}

/* 0, or -1 when a status byte was wrong. */
static int driver(struct shared *s, uint16_t mask, uint32_t depth, struct measurement *m)
{
	uint16_t avail = 0, last = 0;
	uint64_t sector = 0;
	for (uint32_t i = 0; i < depth; i++)
		submit(s, (uint16_t)i, mask, &avail, sector += 8);
	vf_store_release_u16(&s->avail_idx, avail);
	for (uint32_t turn = 0;; turn++) {
		uint16_t used = vf_load_acquire_u16(&s->used_idx);
		if (is_over(m, turn))
			return 0;
		if (used == last) {
			vf_cpu_relax();
			continue;
		}
		while (last != used) {
			uint16_t slot = (uint16_t)(s->used_ring[last & mask].id / 3);
			if (s->slots[slot].status != 0)
				return -1;
			submit(s, slot, mask, &avail, sector += 8);
			last++;
			m->done++;
		}
		vf_store_release_u16(&s->avail_idx, avail);
	}
}

/* A place in a packed ring. */
struct place {
	uint32_t slot, size;
	uint16_t wrap_counter;
};

static inline uint32_t slot_behind(const struct place *at, uint32_t count)
{
	uint32_t slot = at->slot + count;
	return slot < at->size ? slot : slot - at->size;
}

static inline void advance(struct place *at)
{
	uint32_t slot = slot_behind(at, 3);
	at->wrap_counter ^= slot < at->slot;
	at->slot = slot;
}

/* The two bits of a descriptor that is available, or used, in this turn of the ring. */
static inline uint16_t avail_bits(uint16_t wrap_counter)
{
	return wrap_counter ? PACKED_AVAIL : PACKED_USED;
}

static inline uint16_t used_bits(uint16_t wrap_counter)
{
	return wrap_counter ? PACKED_AVAIL | PACKED_USED : 0;
}

static void device_packed(struct shared *s, uint32_t size)
{
	struct place at = { 0, size, 1 };
	uint64_t sectors = 0;
	while (!vf_load_relaxed_u32(&s->stop)) {
		struct packed_desc *first = &s->packed[at.slot];
		uint16_t flags = vf_load_acquire_u16(&first->flags);
		if ((flags & (PACKED_AVAIL | PACKED_USED)) != avail_bits(at.wrap_counter)) {
			vf_cpu_relax();
			continue;
		}
		struct packed_desc data = s->packed[slot_behind(&at, 1)], status = s->packed[slot_behind(&at, 2)];
		sectors += ((const struct header *)(uintptr_t)first->addr)->sector + data.len;
		*(uint8_t *)(uintptr_t)status.addr = 0;
		first->id = status.id;
		first->len = data.len + 1;
		vf_store_release_u16(&first->flags, used_bits(at.wrap_counter));
		advance(&at);
	}
	s->sectors = sectors;
}

static void submit_packed(struct shared *s, uint16_t slot, struct place *at, uint64_t sector)
{
	struct slot *line = &s->slots[slot];
	struct packed_desc *first = &s->packed[at->slot];
	uint32_t data = slot_behind(at, 1), status = slot_behind(at, 2);
	line->header = (struct header){ 0, 0, sector };
	line->status = 0xff;
	/* Descriptors behind the end of the ring belong to its next turn. */
	uint16_t data_bits = avail_bits(at->wrap_counter ^ (data < at->slot));
	uint16_t status_bits = avail_bits(at->wrap_counter ^ (status < at->slot));
	s->packed[data] = (struct packed_desc){ 0x100000000ull + 4096ull * slot, 4096, slot,
						(uint16_t)(data_bits | VF_DESC_F_NEXT | VF_DESC_F_WRITE) };
	s->packed[status] = (struct packed_desc){ (uintptr_t)&line->status, 1, slot,
						  (uint16_t)(status_bits | VF_DESC_F_WRITE) };
	first->addr = (uintptr_t)&line->header;
	first->len = 16;
	first->id = slot;
	/* All of the chain is available with its first descriptor. */
	vf_store_release_u16(&first->flags, (uint16_t)(avail_bits(at->wrap_counter) | VF_DESC_F_NEXT));
	advance(at);
}

static int driver_packed(struct shared *s, uint32_t size, uint32_t depth, struct measurement *m)
{
	struct place avail = { 0, size, 1 }, used = avail;
	uint64_t sector = 0;
	for (uint32_t i = 0; i < depth; i++)
		submit_packed(s, (uint16_t)i, &avail, sector += 8);
	for (uint32_t turn = 0; !is_over(m, turn); turn++) {
		const struct packed_desc *first = &s->packed[used.slot];
		uint16_t flags = vf_load_acquire_u16(&first->flags);
		if ((flags & (PACKED_AVAIL | PACKED_USED)) != used_bits(used.wrap_counter)) {
			vf_cpu_relax();
			continue;
		}
		uint16_t slot = first->id;
		if (slot >= depth || s->slots[slot].status != 0)
			return -1;
		advance(&used);
		submit_packed(s, slot, &avail, sector += 8);
		m->done++;
	}
	return 0;
}

int main(int argc, char **argv)
{
	double seconds = 2;
	uint32_t depth = 32, size = 256;
	int driver_cpu = 1, device_cpu = 0, packed = 0, option;
	while ((option = getopt(argc, argv, "pt:d:c:C:q:")) != -1) {
		switch (option) {
		case 'p': packed = 1; break;
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
		if (packed)
			device_packed(s, size);
		else
			device(s, (uint16_t)(size - 1));
		_exit(0);
	}
	struct measurement m = { .start_ns = now_ns(), .run_ns = (uint64_t)(seconds * 1e9), .measured_ns = 1 };
	int err = pin(driver_cpu);
	if (err)
		perror("ring_exchange: sched_setaffinity");
	else if ((err = packed ? driver_packed(s, size, depth, &m) : driver(s, (uint16_t)(size - 1), depth, &m)))
		fprintf(stderr, "ring_exchange: the device side gave a wrong answer\n");
	vf_store_relaxed_u32(&s->stop, 1);
	waitpid(child, NULL, 0);
	printf("{\"name\": \"ring_exchange\", \"ring\": \"%s\", \"iodepth\": %u, \"driver_cpu\": %d, \"device_cpu\": %d, "
	       "\"requests\": %llu, \"seconds\": %.6f, \"iops\": %.0f}\n",
	       packed ? "packed" : "split", depth, driver_cpu, device_cpu, (unsigned long long)m.done,
	       (double)m.measured_ns / 1e9, (double)m.done * 1e9 / (double)m.measured_ns);
	return err || !m.done;
}
