/* SPDX-License-Identifier: Apache-2.0
 *
 * Functions that libc exports and no header declares: those of _FORTIFY_SOURCE, and those of programs that were built with
 * an earlier libc.
 */
#ifndef VF_NAMES_H
#define VF_NAMES_H

#include <stddef.h>
#include <sys/stat.h>
#include <sys/types.h>

int __open_2(const char *path, int flags);
int __open64_2(const char *path, int flags);
int __openat_2(int directory, const char *path, int flags);
int __openat64_2(int directory, const char *path, int flags);

ssize_t __read_chk(int fd, void *buffer, size_t length_bytes, size_t buffer_bytes);
ssize_t __pread_chk(int fd, void *buffer, size_t length_bytes, off_t offset, size_t buffer_bytes);
ssize_t __pread64_chk(int fd, void *buffer, size_t length_bytes, off_t offset, size_t buffer_bytes);

int __xstat(int version, const char *path, struct stat *st);
int __lxstat(int version, const char *path, struct stat *st);
int __fxstat(int version, int fd, struct stat *st);
int __fxstatat(int version, int directory, const char *path, struct stat *st, int flags);
int __xstat64(int version, const char *path, struct stat *st);
int __lxstat64(int version, const char *path, struct stat *st);
int __fxstat64(int version, int fd, struct stat *st);
int __fxstatat64(int version, int directory, const char *path, struct stat *st, int flags);

#endif
