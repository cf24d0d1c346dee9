/* SPDX-License-Identifier: Apache-2.0 */
#undef _FORTIFY_SOURCE
#include "preload/real.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

static long missing(void)
{
	errno = ENOSYS;
	return -1;
}

void *vf_real_find(const char *name)
{
	void *found = dlsym(RTLD_NEXT, name);

	return found ? found : (void *)(uintptr_t)missing;
}

void vf_say(const char *format, ...)
{
	static const char prefix[] = "vdusefast: ";
	char line[512];
	int kept_errno = errno;
	size_t length = sizeof(prefix) - 1;
	va_list arguments;
	int count;

	memcpy(line, prefix, length);
	va_start(arguments, format);
	count = vsnprintf(line + length, sizeof(line) - length - 1, format, arguments);
	va_end(arguments);
	if (count > 0) {
		length += (size_t)count < sizeof(line) - length - 1 ? (size_t)count : sizeof(line) - length - 2;
		line[length++] = '\n';
		/* Not write(): nothing of ours or of another preload library is to see it. A stderr that is closed is no fault. */
		(void)!syscall(SYS_write, STDERR_FILENO, line, length);
	}
	errno = kept_errno;
}
