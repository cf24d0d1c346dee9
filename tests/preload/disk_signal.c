/* SPDX-License-Identifier: Apache-2.0
 *
 * A signal handler takes the locks of the ring side while its own thread takes them, many times. Ends with 0, or hangs.
 */
#include <signal.h>
#include <sys/time.h>
#include <unistd.h>

#include "preload/attach.h"

#define ROUNDS 3000u

static volatile sig_atomic_t handled;

static void ask(struct vf_client *client)
{
	struct vf_attach_message message = { .op = VF_ATTACH_EVENTS };
	int fds[2];

	vf_memory_lock();
	if (vf_client_ask(client, &message, -1, fds) == 0) {
		close(fds[0]);
		close(fds[1]);
	}
	vf_memory_unlock();
}

static void handler(int number)
{
	(void)number;
	handled = handled + 1;
	ask(vf_client_now());
}

int main(void)
{
	struct itimerval often = { { 0, 50 }, { 0, 50 } };
	struct sigaction action = { .sa_handler = handler, .sa_flags = SA_RESTART };
	struct vf_client *client = vf_client_get();

	if (!client)
		return 1;
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &often, NULL);
	for (uint32_t i = 0; i < ROUNDS || handled < 100; i++)
		ask(client);
	return 0;
}
