/* SPDX-License-Identifier: Apache-2.0
 *
 * The input as a stream of numbers; little-endian, and zeroes once it has ended.
 */
#include "fuzz_world.h"

static const uint8_t *input;
static size_t input_left;

void fuzz_input_set(const uint8_t *data, size_t size)
{
	input = data;
	input_left = size;
}

bool fuzz_input_left(void)
{
	return input_left > 0;
}

uint8_t fuzz_u8(void)
{
	if (!input_left)
		return 0;
	input_left--;
	return *input++;
}

uint16_t fuzz_u16(void)
{
	uint16_t low = fuzz_u8();

	return (uint16_t)(low | fuzz_u8() << 8);
}

uint32_t fuzz_u32(void)
{
	uint32_t low = fuzz_u16();

	return low | (uint32_t)fuzz_u16() << 16;
}

uint64_t fuzz_u64(void)
{
	uint64_t low = fuzz_u32();

	return low | (uint64_t)fuzz_u32() << 32;
}
