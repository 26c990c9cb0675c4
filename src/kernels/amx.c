/* The amx path: TDPBF16PS multiplies tiles of bfloat16 at some 14 times the rate of multiply-adds. Attention alone; all else is that of
 * the paths behind. Built with the flags of avx512bf16, AMX-TILE and AMX-BF16, so nothing of this file may run before cpu.c has
 * seen them and the system has given its permission. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "compiler.h"

/* Attention of bfloat16 */

#define T bf16
#define TILE_PARTS 1
#include "tiles_amx_tpl.h"
#include "tile_kernel_tpl.h"

/* float16 */

#define T f16
#define TILE_PARTS 2
#include "tiles_amx_tpl.h"
#include "tile_kernel_tpl.h"

/* float32 */

#define T f32
#define TILE_PARTS 3
#include "tiles_amx_tpl.h"
#include "tile_kernel_tpl.h"

const qkv_isa qkv_amx = {
    .name = "amx",
    .needs = QKV_CPU_AVX512 | QKV_CPU_AVX512BF16 | QKV_CPU_AMX,
    .tiles = {&kernels_bf16, &kernels_f16, &kernels_f32},
};
