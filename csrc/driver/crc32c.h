/* SPDX-License-Identifier: Apache-2.0
 *
 * CRC-32C (Castagnoli, RFC 3720): with the SSE4.2 instruction where the CPU has it, else by a table of 8 x 256 entries
 * that vf_crc32c_init() fills. The choice is made at run time; both give the same value.
 */
#ifndef VF_CRC32C_H
#define VF_CRC32C_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define VF_CRC32C_POLY 0x82f63b78u /* reflected */

static uint32_t vf_crc32c_table[8][256];
static bool vf_crc32c_have_sse42;

/* Fill the tables and check the CPU. Call once before the first use; another call is harmless. */
static inline void vf_crc32c_init(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t crc = i;
		for (int bit = 0; bit < 8; bit++)
			crc = (crc >> 1) ^ ((crc & 1u) ? VF_CRC32C_POLY : 0u);
		vf_crc32c_table[0][i] = crc;
	}
	for (uint32_t i = 0; i < 256; i++)
		for (int t = 1; t < 8; t++)
			vf_crc32c_table[t][i] = (vf_crc32c_table[t - 1][i] >> 8) ^
						vf_crc32c_table[0][vf_crc32c_table[t - 1][i] & 0xffu];
#if defined(__x86_64__)
	vf_crc32c_have_sse42 = __builtin_cpu_supports("sse4.2");
#endif
}

static inline uint32_t vf_crc32c_soft(uint32_t crc, const uint8_t *p, size_t len_bytes)
{
	for (; len_bytes >= 8; len_bytes -= 8, p += 8) {
		uint64_t word;
		memcpy(&word, p, 8);
		word ^= crc;
		crc = 0;
		for (int t = 0; t < 8; t++)
			crc ^= vf_crc32c_table[7 - t][(word >> (8 * t)) & 0xffu];
	}
	while (len_bytes--)
		crc = (crc >> 8) ^ vf_crc32c_table[0][(crc ^ *p++) & 0xffu];
	return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static inline uint32_t vf_crc32c_sse42(uint32_t crc, const uint8_t *p,
									 size_t len_bytes)
{
	uint64_t wide = crc;
	for (; len_bytes >= 8; len_bytes -= 8, p += 8) {
		uint64_t word;
		memcpy(&word, p, 8);
		wide = __builtin_ia32_crc32di(wide, word);
	}
	crc = (uint32_t)wide;
	while (len_bytes--)
		crc = __builtin_ia32_crc32qi(crc, *p++);
	return crc;
}
#endif

/* Continue `crc` (0 at the start) over `len_bytes` at `data`. */
static inline uint32_t vf_crc32c(uint32_t crc, const void *data, size_t len_bytes)
{
	crc = ~crc;
#if defined(__x86_64__)
	if (vf_crc32c_have_sse42)
		return ~vf_crc32c_sse42(crc, data, len_bytes);
#endif
	return ~vf_crc32c_soft(crc, data, len_bytes);
}

#endif
