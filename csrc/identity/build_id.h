/* SPDX-License-Identifier: Apache-2.0
 *
 * The identity of the build that an extension belongs to (vdusefast/base/build.py). It is a file of its own, so that nothing else
 * is compiled again when it changes.
 */
#ifndef VF_BUILD_ID_H
#define VF_BUILD_ID_H

__attribute__((visibility("hidden"))) const char *vf_build_id(void);

#endif
