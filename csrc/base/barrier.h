/* SPDX-License-Identifier: Apache-2.0
 *
 * Every access to memory that a driver shares, and every ordering between such accesses. No other file names an atomic
 * or a fence.
 *
 * Reads of shared memory happen once, into a local; the local is checked and used. In a build with VF_FUZZ each read
 * first calls vf_fuzz_shared_read(), which may change the memory, as a hostile driver would between two reads.
 *
 * The barriers of a ring, each named where it stands in vring_split.h, vring_packed.h and the driver's side of these:
 *
 *   A  the device loads avail->idx with acquire    pairs with the driver's release store of avail->idx:
 *      entries and descriptors below the index are complete when it is seen.
 *   B  the device stores used->idx with release    pairs with the driver's acquire load of used->idx:
 *      data, status and used elements are complete when it is seen.
 *   C  the device enables notifications (avail_event or used->flags), full fence, checks avail->idx again;
 *      the driver publishes avail->idx, full fence, checks avail_event or used->flags. One of the two sees the
 *      other's store, so a request is either found by the second check or announced by a kick.
 *   D  the device publishes used->idx, full fence, checks used_event or avail->flags; the driver arms the
 *      interrupt, full fence, checks used->idx again. The mirror image of C.
 *
 * One barrier has both its sides in this process: E, of publisher.h.
 *
 * A packed ring (vring_packed.h, driver_packed.h) has the same four. In place of avail->idx stand the flags of the first
 * descriptor that a batch makes available, in place of used->idx those of each used descriptor, and in
 * place of avail_event and used_event the event suppression structures, each loaded and stored as one u32.
 */
#ifndef VF_BARRIER_H
#define VF_BARRIER_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "rings are little-endian; this host is not");

#ifdef VF_FUZZ
void vf_fuzz_shared_read(const volatile void *address, size_t len_bytes);
#define VF_SHARED_READ(p, n) vf_fuzz_shared_read((p), (n))
#else
#define VF_SHARED_READ(p, n) ((void)0)
#endif

#define vf_likely(x) __builtin_expect(!!(x), 1)
#define vf_unlikely(x) __builtin_expect(!!(x), 0)

static inline uint16_t vf_load_acquire_u16(const uint16_t *p)
{
	VF_SHARED_READ(p, sizeof(*p));
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static inline uint64_t vf_load_acquire_u64(const uint64_t *p)
{
	VF_SHARED_READ(p, sizeof(*p));
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static inline uint32_t vf_load_acquire_u32(const uint32_t *p)
{
	VF_SHARED_READ(p, sizeof(*p));
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static inline void vf_store_release_u16(uint16_t *p, uint16_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELEASE);
}

static inline void vf_store_release_u32(uint32_t *p, uint32_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELEASE);
}

static inline void vf_store_release_u64(uint64_t *p, uint64_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELEASE);
}

/* Store v if there is 0, atomically among threads that try the same. */
static inline void vf_set_once_u64(uint64_t *p, uint64_t v)
{
	uint64_t none = 0;

	__atomic_compare_exchange_n(p, &none, v, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

static inline uint16_t vf_load_relaxed_u16(const uint16_t *p)
{
	VF_SHARED_READ(p, sizeof(*p));
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline uint8_t vf_load_relaxed_u8(const uint8_t *p)
{
	VF_SHARED_READ(p, sizeof(*p));
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

/* A load whose value is only a hint: nothing but speed depends on it. */
static inline uint16_t vf_peek_u16(const uint16_t *p)
{
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline uint64_t vf_peek_u64(const uint64_t *p)
{
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline uint32_t vf_peek_u32(const uint32_t *p)
{
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

/* A pointer that the threads of this process share. */
#define vf_peek_pointer(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define vf_store_relaxed_pointer(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define vf_peek_acquire_pointer(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define vf_store_release_pointer(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)

/* Of memory that only the threads of this process share. */
static inline uint32_t vf_peek_acquire_u32(const uint32_t *p)
{
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

/* Replace a value if it is there; acquires what was stored before it, and releases what we have stored. Else acquires, too. */
static inline int vf_exchange_if_u32(uint32_t *p, uint32_t from, uint32_t to)
{
	return __atomic_compare_exchange_n(p, &from, to, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

static inline int vf_exchange_if_u64(uint64_t *p, uint64_t from, uint64_t to)
{
	return __atomic_compare_exchange_n(p, &from, to, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

/* Read-modify-write of words that threads and processes of ours share; each is a full fence. */
static inline uint32_t vf_exchange_u32(uint32_t *p, uint32_t v)
{
	return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);
}

static inline uint64_t vf_exchange_u64(uint64_t *p, uint64_t v)
{
	return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);
}

static inline uint64_t vf_fetch_and_u64(uint64_t *p, uint64_t bits)
{
	return __atomic_fetch_and(p, bits, __ATOMIC_SEQ_CST);
}

static inline uint64_t vf_fetch_or_u64(uint64_t *p, uint64_t bits)
{
	return __atomic_fetch_or(p, bits, __ATOMIC_SEQ_CST);
}

static inline uint32_t vf_load_relaxed_u32(const uint32_t *p)
{
	VF_SHARED_READ(p, sizeof(*p));
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline uint64_t vf_load_relaxed_u64(const uint64_t *p)
{
	VF_SHARED_READ(p, sizeof(*p));
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline void vf_store_relaxed_u16(uint16_t *p, uint16_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELAXED);
}

static inline void vf_store_relaxed_u32(uint32_t *p, uint32_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELAXED);
}

static inline void vf_store_relaxed_u64(uint64_t *p, uint64_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELAXED);
}

static inline void vf_store_relaxed_u8(uint8_t *p, uint8_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELAXED);
}

/* Orders earlier stores before later loads, which acquire and release do not. */
static inline void vf_fence_full(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* Keeps the compiler from moving memory accesses across; for memory shared with this process's own successors. */
static inline void vf_fence_compiler(void)
{
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
}

/* Copy out of shared memory once: the compiler can neither repeat the reads nor move them after the asm. */
static inline void vf_copy_from_shared(void *to, const void *from, size_t len_bytes)
{
	VF_SHARED_READ(from, len_bytes);
	memcpy(to, from, len_bytes);
	__asm__ __volatile__("" : : "r"(to) : "memory");
}

/* Two words of shared memory, at any alignment, read once: after the asm they are values, not memory. */
static inline void vf_load_pair_from_shared(const void *from, uint64_t *first, uint64_t *second)
{
	uint64_t a, b;

	VF_SHARED_READ(from, sizeof(a) + sizeof(b));
	memcpy(&a, from, sizeof(a));
	memcpy(&b, (const uint8_t *)from + sizeof(a), sizeof(b));
	__asm__ __volatile__("" : "+r"(a), "+r"(b));
	*first = a;
	*second = b;
}

/* Read one byte, only to fault its page in. */
static inline void vf_touch_shared(const uint8_t *p)
{
	VF_SHARED_READ(p, 1);
	(void)*(const volatile uint8_t *)p;
}

static inline void vf_copy_to_shared(void *to, const void *from, size_t len_bytes)
{
	memcpy(to, from, len_bytes);
	__asm__ __volatile__("" : : : "memory");
}

static inline void vf_cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ __volatile__("isb" : : : "memory");
#else
	__asm__ __volatile__("" : : : "memory");
#endif
}

#endif
