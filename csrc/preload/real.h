/* SPDX-License-Identifier: Apache-2.0
 *
 * The functions that this library stands before: how it reaches those of libc, and how its own are exported.
 */
#ifndef VF_REAL_H
#define VF_REAL_H

#include <stdint.h>

#include "base/barrier.h"

_Static_assert(sizeof(void *) == sizeof(uint64_t) && sizeof(long) == sizeof(uint64_t), "off_t and off64_t must be the same");

#define VF_EXPORT __attribute__((visibility("default")))

#if __has_attribute(copy)
#define VF_LIKE(function) __attribute__((alias(#function), copy(function)))
#else
#define VF_LIKE(function) __attribute__((alias(#function)))
#endif

/* Another name of an exported function: of the 64-bit variants, which are the same here. */
#define VF_ALSO(name, function)                                                                                        \
	extern VF_EXPORT __typeof__(function) vf_also_##name __asm__(#name) VF_LIKE(function)

/* The next function of that name in the order of loading: another preload library's or libc's. Where there is none, one
 * that fails with ENOSYS. */
void *vf_real_find(const char *name);

/* Looked up at the first call, which may come before our constructor: from the constructor of another library. */
#define VF_REAL(function)                                                                                              \
	({                                                                                                             \
		static uint64_t real_at;                                                                               \
		uint64_t found_at = vf_peek_u64(&real_at);                                                             \
		if (vf_unlikely(!found_at)) {                                                                          \
			found_at = (uint64_t)(uintptr_t)vf_real_find(#function);                                       \
			vf_store_relaxed_u64(&real_at, found_at);                                                      \
		}                                                                                                      \
		(__typeof__(&function))(uintptr_t)found_at;                                                            \
	})

/* One line on stderr, "vdusefast: ...", for what errno alone cannot say. Keeps errno. A signal handler may call it. */
void vf_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
