/* SPDX-License-Identifier: Apache-2.0
 *
 * The size of a page: 4 KiB on most machines, 16 or 64 KiB on others. Offsets and lengths of mappings are multiples of it.
 */
#ifndef VF_PAGE_H
#define VF_PAGE_H

#include <stdint.h>

/* The largest page that any of our machines has. */
#define VF_PAGE_MAX_BYTES 65536u

/* In bytes. VDUSEFAST_TEST_PAGE_BYTES in the environment is for tests alone: a larger size than the machine's, so that
 * it shows whether all mappings are aligned for such a machine. vdusefast/base/page.py reads it, too. */
uint32_t vf_page_bytes(void);

#endif
