/* SPDX-License-Identifier: Apache-2.0 */
#undef _FORTIFY_SOURCE
#define _GNU_SOURCE
#include "preload/streams.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "preload/files.h"
#include "preload/real.h"

static int fd_of(void *cookie)
{
	return (int)(intptr_t)cookie;
}

static ssize_t read_stream(void *cookie, char *buffer, size_t length_bytes)
{
	return read(fd_of(cookie), buffer, length_bytes);
}

/* A stream wants all or an error, which is 0 here. */
static ssize_t write_stream(void *cookie, const char *buffer, size_t length_bytes)
{
	size_t done = 0;

	while (done < length_bytes) {
		ssize_t result = write(fd_of(cookie), buffer + done, length_bytes - done);

		if (result <= 0)
			break;
		done += (size_t)result;
	}
	return (ssize_t)done;
}

static int seek_stream(void *cookie, off_t *offset, int whence)
{
	off_t at = lseek(fd_of(cookie), *offset, whence);

	if (at < 0)
		return -1;
	*offset = at;
	return 0;
}

static int close_stream(void *cookie)
{
	return close(fd_of(cookie));
}

static FILE *open_stream(int fd, const char *mode)
{
	cookie_io_functions_t functions = { read_stream, write_stream, seek_stream, close_stream };
	FILE *stream = fopencookie((void *)(intptr_t)fd, mode, functions);

	if (stream)
		stream->_fileno = fd; /* for fileno(); libc uses a cookie's functions all the same */
	return stream;
}

static int flags_of(const char *mode)
{
	int flags = strchr(mode, '+') ? O_RDWR : *mode == 'r' ? O_RDONLY : O_WRONLY;

	return strchr(mode, 'e') ? flags | O_CLOEXEC : flags;
}

VF_EXPORT FILE *fopen(const char *path, const char *mode)
{
	FILE *stream = VF_REAL(fopen)(path, mode);
	int fd;

	if (vf_likely(stream || errno != ENXIO))
		return stream;
	fd = open(path, flags_of(mode));
	if (fd < 0)
		return NULL;
	stream = open_stream(fd, mode);
	if (!stream)
		close(fd);
	return stream;
}
VF_ALSO(fopen64, fopen);

VF_EXPORT FILE *fdopen(int fd, const char *mode)
{
	struct vf_file *file = vf_file_of(fd);
	int wanted = flags_of(mode) & O_ACCMODE, has;

	if (vf_likely(!file))
		return VF_REAL(fdopen)(fd, mode);
	has = (int)vf_file_flags(file) & O_ACCMODE;
	if (has != O_RDWR && has != wanted) {
		errno = EINVAL;
		return NULL;
	}
	return open_stream(fd, mode);
}

void vf_streams_start(void)
{
	if (vf_file_of(STDIN_FILENO)) {
		FILE *stream = open_stream(STDIN_FILENO, "r");

		if (stream)
			stdin = stream;
	}
	if (vf_file_of(STDOUT_FILENO)) {
		FILE *stream = open_stream(STDOUT_FILENO, "w");

		if (stream)
			stdout = stream;
	}
}
