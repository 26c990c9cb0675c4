/* The CPU paths of this build that this machine can run. */
#ifndef QKV_CPU_H
#define QKV_CPU_H

#include "kernels/kernels.h"

const qkv_isa *qkv_isa_at(int index);                  /* best first; NULL past the end */

#endif
