/* Keys that several sequences share. */
#ifndef QKV_BEAMS_H
#define QKV_BEAMS_H

#include "qkv.h"

/* The problem itself; or, where sequences along an axis share K, V and limits, `room` with the same problem, in which they are
 * beams of one sequence. Bits are the same: which kernel is asked follows from the rows of one beam. */
const qkv_problem *qkv_fold(const qkv_problem *problem, qkv_problem *room);

#endif
