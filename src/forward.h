/* The driver of tiles. qkv_forward itself is in qkv.h. */
#ifndef QKV_FORWARD_H
#define QKV_FORWARD_H

#include "plan.h"

/* Carries out a plan with tasks. */
qkv_status qkv_run_plan(const qkv_problem *problem, const qkv_plan *plan);

#endif
