/* The CPU paths of this build that this machine can run. */
#ifndef QKV_CPU_H
#define QKV_CPU_H

#include "kernels/kernels.h"

const qkv_isa *qkv_isa_at(int index);                  /* best first; NULL past the end */
const qkv_pairs *qkv_pairs_here(void);                 /* NULL where the build or the CPU has none */

#endif
