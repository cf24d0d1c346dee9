/* SPDX-License-Identifier: Apache-2.0
 *
 * What the files of this test program share. Each states what holds of one part of csrc; CHECK aborts with the line of what does
 * not.
 */
#ifndef CSRC_UNIT_H
#define CSRC_UNIT_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "queue/queue.h"

#define CHECK(condition)                                                                                               \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                 \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

/* A new file in memory, which the caller closes. */
static inline int memory_fd(size_t size)
{
	int fd = memfd_create("unit", MFD_CLOEXEC);

	CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
	return fd;
}

void test_memory(void); /* csrc_unit_memory.c */
void test_stores(void); /* csrc_unit_store.c */
void test_pieces(void); /* csrc_unit_pieces.c */
void test_irq_coalesce(void); /* csrc_unit_irq.c */

#endif
