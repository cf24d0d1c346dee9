/* SPDX-License-Identifier: Apache-2.0
 *
 * The engines of the core by name. vdusefast/base/engines.py has their properties for the rest of the program.
 */
#include "engine/engine.h"

#include <string.h>

static const struct vf_engine_ops *const vf_engines[] = {
	&vf_engine_sync, &vf_engine_uring, &vf_engine_cached, &vf_engine_memory, &vf_engine_null, &vf_engine_fail,
};

const struct vf_engine_ops *vf_engine_find(const char *name)
{
	for (size_t i = 0; i < sizeof(vf_engines) / sizeof(vf_engines[0]); i++)
		if (strcmp(vf_engines[i]->name, name) == 0)
			return vf_engines[i];
	return NULL;
}
