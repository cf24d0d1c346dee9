/* SPDX-License-Identifier: Apache-2.0
 *
 * Streams of stdio on the disk. libc's own streams read by system calls that this library does not see.
 */
#ifndef VF_STREAMS_H
#define VF_STREAMS_H

/* Have stdin and stdout be such streams where descriptors 0 and 1 are the disk. */
void vf_streams_start(void);

#endif
