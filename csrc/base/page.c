/* SPDX-License-Identifier: Apache-2.0 */
#include "base/page.h"

#include <stdlib.h>
#include <unistd.h>

uint32_t vf_page_bytes(void)
{
	static uint32_t page_bytes;
	const char *text;
	unsigned long wanted;

	if (page_bytes)
		return page_bytes;
	page_bytes = (uint32_t)sysconf(_SC_PAGESIZE);
	text = getenv("VDUSEFAST_TEST_PAGE_BYTES");
	wanted = text ? strtoul(text, NULL, 10) : 0;
	if (wanted > page_bytes && wanted <= VF_PAGE_MAX_BYTES && (wanted & (wanted - 1u)) == 0)
		page_bytes = (uint32_t)wanted;
	return page_bytes;
}
