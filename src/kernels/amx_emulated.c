/* The amx path without its unit: tiles are arrays, and what is done with them is done by rows of registers, bit by bit as the unit
 * does it. For tests on CPUs that have none: far too slow for anything else. */
#include <float.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "compiler.h"

#define VECTOR_BYTES 64
#define FUSED 1

/* Attention of bfloat16 */

#define T bf16
#define TILE_PARTS 1
#include "tiles_emulated_tpl.h"
#include "tile_kernel_tpl.h"

/* float16 */

#define T f16
#define TILE_PARTS 2
#include "tiles_emulated_tpl.h"
#include "tile_kernel_tpl.h"

/* float32 */

#define T f32
#define TILE_PARTS 3
#include "tiles_emulated_tpl.h"
#include "tile_kernel_tpl.h"

const qkv_isa qkv_amx_emulated = {
    .name = "amx_emulated",
    .needs = QKV_CPU_AVX2 | QKV_CPU_FMA | QKV_CPU_F16C,
    .tiles = {&kernels_bf16, &kernels_f16, &kernels_f32},
};
