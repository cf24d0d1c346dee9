/* SPDX-License-Identifier: Apache-2.0 */
#include "identity/build_id.h"

#ifndef VF_BUILD_ID
#define VF_BUILD_ID "none" /* setup.py defines it */
#endif

const char *vf_build_id(void)
{
	return VF_BUILD_ID;
}
