/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory that the device reaches without a copy: a memfd that is mapped shared.
 */
#ifndef VF_MEMORY_H
#define VF_MEMORY_H

#include <stddef.h>

/* A memfd of this size, at a high number. -1 with errno. */
int vf_memory_make(size_t length_bytes);

/* mmap() of a memfd, which is consumed; forgotten by munmap(). */
void *vf_memory_map(void *address, size_t length_bytes, int protection, int flags, int fd);

#endif
