/* The portable path: no intrinsics, whatever the baseline of the target is. 16-byte vectors fit every one of them. */
#include <float.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "compiler.h"

#define VECTOR_BYTES 16

#define T f32
#define REAL_TYPE float
#define BITS_TYPE uint32_t
#define MANTISSA_BITS 23
#define EXPONENT_BIAS 127
#include "portable_tpl.h"

#define LANE_VECTORS 3
#define ROW_TILE 4
#define ROW_TILE_1 4
#define LANE_MADS 0
#define SUMS 8
#define PAIR 1
#define NARROWS 1
#define WIDENS 0
#define EXP2_STEPS 1
#include "kernel_tpl.h"

#define T f64
#define REAL_TYPE double
#define BITS_TYPE uint64_t
#define MANTISSA_BITS 52
#define EXPONENT_BIAS 1023
#include "portable_tpl.h"
#define LANE_VECTORS 3
#define ROW_TILE 4
#define ROW_TILE_1 4
#define LANE_MADS 0
#define SUMS 8
#define PAIR 1
#define NARROWS 0
#define WIDENS 0
#define EXP2_STEPS 1
#include "kernel_tpl.h"

const qkv_isa qkv_portable = {
    .name = "portable",
    .needs = 0,
    .type = {&kernels_f32, &kernels_f64},
};
