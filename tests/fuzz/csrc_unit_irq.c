/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "csrc_unit.h"

/* A driver as interrupt moderation sees it, in simulated time; the device itself takes none. */
struct sim_driver {
	uint32_t depth; /* requests in flight at most */
	uint64_t send_ns; /* CPU time of a request */
	uint64_t irq_ns; /* of an interrupt */
	uint64_t every_ns; /* a request comes so often whatever is done; 0 = as soon as it can */
};

struct sim_result {
	uint64_t irqs;
	uint64_t ns;
};

static struct sim_result simulate(struct vf_irq_coalesce *hold, const struct sim_driver *driver, uint64_t *clock_ns, uint32_t count)
{
	uint64_t start_ns = *clock_ns, now_ns = start_ns, irqs = 0;
	uint32_t owed = 0;

	for (uint32_t sent = 0; sent < count || owed;) {
		int told = 0;

		if (sent < count && owed < driver->depth && now_ns >= start_ns + sent * driver->every_ns) {
			sent++;
			owed++;
			now_ns += driver->send_ns;
			told = hold->limit_ns == 0 || vf_irq_coalesce_should_interrupt(hold, owed, now_ns);
		} else {
			now_ns += 100;
		}
		if (!told && hold->since_ns)
			told = vf_irq_coalesce_expired(hold, owed, now_ns);
		if (told) {
			hold->since_ns = 0;
			owed = 0;
			irqs++;
			now_ns += driver->irq_ns;
		}
	}
	*clock_ns = now_ns;
	return (struct sim_result){ .irqs = irqs, .ns = now_ns - start_ns };
}

void test_irq_coalesce(void)
{
	static const struct sim_driver deep = { .depth = 32, .send_ns = 1000, .irq_ns = 5000 };
	static const struct sim_driver four = { .depth = 4, .send_ns = 1000, .irq_ns = 5000 };
	static const struct sim_driver single = { .depth = 1, .send_ns = 1000, .irq_ns = 5000 };
	static const struct sim_driver leisurely = { .depth = 32, .send_ns = 1000, .irq_ns = 5000, .every_ns = 40000 };
	struct vf_irq_coalesce hold = { .limit_ns = 200000 };
	struct vf_irq_coalesce none = { .limit_ns = 0 };
	uint64_t clock_ns = 1000000;
	struct sim_result result, plain;

	/* One request at a time: next to nothing is lost. */
	plain = simulate(&none, &single, &clock_ns, 100000);
	result = simulate(&hold, &single, &clock_ns, 100000);
	CHECK(result.irqs == 100000 && result.ns < plain.ns + plain.ns / 100u);

	/* A driver short of CPU: an interrupt for many, and twice the requests. */
	plain = simulate(&none, &deep, &clock_ns, 100000);
	result = simulate(&hold, &deep, &clock_ns, 100000);
	CHECK(plain.irqs == 100000 && result.irqs < 100000 / 8 && result.ns < plain.ns / 2u);
	plain = simulate(&none, &four, &clock_ns, 100000);
	result = simulate(&hold, &four, &clock_ns, 100000);
	CHECK(result.irqs < 100000 / 2 && result.ns < plain.ns * 3u / 4u);

	/* Requests that come no faster for it are told of one by one, whatever was learnt before. */
	simulate(&hold, &deep, &clock_ns, 10000);
	simulate(&hold, &leisurely, &clock_ns, 5000);
	result = simulate(&hold, &leisurely, &clock_ns, 100000);
	CHECK(result.irqs > 95000);

	/* Back to one at a time: the batch is given up within a few requests, and none waits longer than the limit. */
	simulate(&hold, &deep, &clock_ns, 10000);
	CHECK(hold.batch > 1);
	result = simulate(&hold, &single, &clock_ns, 100);
	CHECK(hold.batch <= 1 && result.ns < 100 * 6000 + 20 * 200000);
}
