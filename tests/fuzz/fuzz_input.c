/* SPDX-License-Identifier: Apache-2.0
 *
 * The input as a stream of numbers; little-endian, and zeroes once it has ended. And an eye on inputs that take for ever.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <sys/time.h>

#include "fuzz_world.h"

int LLVMFuzzerInitialize(int *argc, char ***argv);

static const uint8_t *input;
static size_t input_left;
static volatile uint64_t input_count;

void fuzz_input_set(const uint8_t *data, size_t size)
{
	input_count++;
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

/* A hang, by the CPU's time: a virtual machine that is halted for minutes makes libFuzzer's own time-out cry wolf. Three
 * ticks, because the first one after such a halt may come early. */
static void on_cpu_tick(int signo)
{
	static uint64_t last_input;
	static uint32_t ticks;

	(void)signo;
	ticks = last_input == input_count ? ticks + 1u : 0;
	last_input = input_count;
	if (ticks == 3u)
		abort();
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	struct sigaction action = { .sa_handler = on_cpu_tick, .sa_flags = SA_RESTART };
	struct itimerval interval = { .it_interval = { .tv_sec = 5 }, .it_value = { .tv_sec = 5 } };

	(void)argc;
	(void)argv;
	return sigaction(SIGVTALRM, &action, NULL) || setitimer(ITIMER_VIRTUAL, &interval, NULL);
}
