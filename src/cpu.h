/* The CPU paths of this build that this machine can run. */
#ifndef QKV_CPU_H
#define QKV_CPU_H

#include "kernels/kernels.h"

const qkv_isa *qkv_isa_at(int index);                  /* best first; NULL past the end */
const qkv_kernels *qkv_kernels_at(int index, int type);      /* of float32 or float64, of this path or the first after it that has them */
int qkv_path_with(const qkv_kernels *kernels, int isa);      /* the path that has a table, of those from isa on */
int qkv_may_use_tiles(const qkv_isa *isa);             /* whether it has tiles and the system allows them; asks if need be */

#endif
