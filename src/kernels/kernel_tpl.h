/* All functions of one CPU path for one element type, and their table.
 *
 * Parameters, defined by the file that includes this one:
 *   T              suffix of the type: f32, f64; every name below ends in _##T
 *   LANE_VECTORS   vectors in a panel row: up to 4
 *   ROW_TILE       keys, or output columns, that the product holds in registers at a time: even, and strips of 32 keys are whole
 *                  tiles; twice as many where half the vectors or fewer are at work
 *   ROW_TILE_1     the same where only one vector is at work: a multiple of ROW_TILE, with enough sums to hide the latency
 *   LANE_MADS      1 where a multiply-add takes one factor from an element of a vector: A is then loaded as vectors; else 0
 *   SUMS           sums that few rows hold in registers: a multiple of 4 and of w
 *   PAIR           elements that one multiplication takes: 2 where it adds the products of pairs of 16 bits, else 1
 *   NARROWS        1 where 16-bit types are computed in this one, else 0
 *   WIDENS         1 where few rows of narrower types are widened as they are loaded, which is a kind of code for each
 *   HALVES_AHEAD   if WIDENS or PAIR is 2: bytes between what some rows read of K and V in 16 bits and what is fetched
 *   HALVES_SHARED  if WIDENS: 1 where two rows share a read of V in 16 bits, for which there are registers, else 0
 *   TILE_PARTS     1, 2 or 3 where attention and multiply, and nothing else, are of tiles: parts of a number (tiles_tpl.h). Undefined where
 *                  products are of rows of registers
 *   BYTES_BY_PAIRS 1 where the file has dot_two, else undefined
 *   EXP2_STEPS     fractions of an exponent that power can look up: 8, or 1 where looking up is slow; no other has a polynomial
 *
 * Primitives, static inline functions of that file (w is the number of elements in a vector):
 *   real, vec, mask          the element, the vector, the result of a comparison (types)
 *   width                    w, an enum constant
 *   load(p) store(p, x)      aligned to a vector
 *   loadu(p) storeu(p, x)    any alignment
 *   stream(p, x) fence()     aligned, past the caches where the CPU can; visible to other threads after the fence
 *   load_part(p, n) store_part(p, x, n)      the first n elements, 0 <= n <= w, any alignment; nothing past them is touched, and
 *                            what is loaded has 0 behind them
 *   seen(p, n)               comparison: which of the first n bytes at p, 0 <= n <= w, are not 0; false past them, which are not read
 *   widen_f16(p) widen_bf16(p)           w elements of 16 bits, any alignment, subnormal ones too
 *   widen_i8(p)              w signed bytes; if WIDENS
 *   widen_i4(p, at, scale)   w elements from number `at`, a multiple of w, of the 32 of a group of int4 whose 16 bytes are at p:
 *                            byte j holds n of element j in its low half and of element j + 16 in its high one, and an element
 *                            is n - 8 times the bfloat16 at `scale`, which two bytes of its row are before; if WIDENS
 *   narrow_f16(p, x) narrow_bf16(p, x)   back, rounded to nearest even; if NARROWS
 * and where PAIR is 2 (a pair is as large as a real; its first element is the low half):
 *   mad(x, y, z)             z + both products of the pairs x and y
 *   mad_seen(v, p, z)        the same without those where p is -1
 *   join(x, y)               pairs of the elements of x and of y, rounded
 *   append(x, y)             the elements of x, then those of y, rounded
 *   load_halves(p, n)        the first n <= 2 w elements of 16 bits, any alignment, 0 behind; nothing past them is touched
 *   zip(x, y, at)            w of the 2 w pairs of the elements of x and of y, at 0 and w, in an order of their own
 *   unzip(x, y, at)          w of the 2 w reals of such pairs, x at 0 and y at w, at 0 and w in their first order
 *   interleave(a, b)         pairs of w elements of 16 bits each, any alignment
 *   turn(a, x)               x with the sign of a
 * and where there are TILE_PARTS, W is 16 and PAIR 2, of these two lists only join, interleave and turn, and
 *   even(x) odd(x)           the first or second elements of pairs, as reals
 *   cut(x, y)                pairs of the elements of x and of y whose last 16 bits are cut off
 *   TILE_UNIT                declares what the macros below need, once in a function; what was stored before it is in memory
 *   TILE_CONFIGURE() TILE_RELEASE()      around all use by a thread: tiles 0 to 7 of 16 rows of 64 bytes
 *   TILE_ZERO(i)  TILE_LOAD(i, p, row)  TILE_STORE(i, p, row)      tile i, a constant; rows are so many reals apart
 *   TILE_MULTIPLY(c, a, b)   tile c + the products of the pairs in rows of a and columns of b, as tile_row has it
 * and in any case:
 *   set1(a)  add sub mul div(x, y)  fma(x, y, z) = x * y + z
 *   mad_lane(x, i, y, z)     z + y times element i of x, or, where PAIR is 2, z + both products of the pairs y and pair i of x; i
 *                            is known once loops are unrolled; if LANE_MADS
 *   load_on(&p, step, x, n)  x[n] <- the n vectors at p, 1, 2 or 4, any alignment; p moves on by step elements; likewise
 *   min max(x, y)            NaN where y is NaN; x is not
 *   maxnum(x, y)             y where x is NaN; y is not
 *   less(x, y)  equal(x, y)  beyond(x, y) = !(x <= y)      comparisons; select(mask, x, y) = mask ? x : y; any(mask)
 *   power(t)                 2^n, where t is n + 1.5 * 2^mantissa / EXP2_STEPS in its own rounding: n, a multiple of
 *                            1 / EXP2_STEPS, lies in t's low bits. 0 at the lowest exponent, infinity past the highest
 *   exchange(x, y)           neighbours change places among the elements of *x and those of *y behind them; unless PAIR is 2
 *   dot_two(key, key_row, q, dim, to)    products of two rows of dim bytes with four of int16, dim apart: of row r with q at
 *                            to[r * QKV_BYTES_GROUP] and behind; if BYTES_BY_PAIRS. Others leave it to compilers (bytes_tpl.h)
 *   transpose(x)             x[w] as a w * w matrix, in place
 *   sum_each(x)              of x[w], which it may change: element i is the sum of x[i], all of them in the same order
 */
#include <float.h>
#include <math.h>
#include <string.h>

#ifndef TILE_PARTS
#define TILE_PARTS 0
#endif
#ifndef BYTES_BY_PAIRS
#define BYTES_BY_PAIRS 0
#endif

#include "exp2_poly.h"
#include "tanh_poly.h"

#define QKV_JOIN2(a, b) a##_##b
#define QKV_JOIN(a, b) QKV_JOIN2(a, b)
#define X(name) QKV_JOIN(name, T)
#define REAL X(real)
#define VEC X(vec)
#define W X(width)
#define LANES (LANE_VECTORS * W)
/* Rows of a product in registers where nv vectors are at work, and the most of them. */
#define ROWS(nv) ((nv) == 1 ? ROW_TILE_1 : 2 * (nv) <= LANE_VECTORS ? 2 * ROW_TILE : ROW_TILE)
#define MOST_ROWS (ROWS(1) > ROWS(2) ? ROWS(1) : ROWS(2))
#define REAL_LARGEST ((REAL)(sizeof(REAL) == 4 ? FLT_MAX : DBL_MAX))

_Static_assert(LANE_VECTORS >= 1 && LANE_VECTORS <= 4, "BY_VECTORS knows no more");
_Static_assert(ROW_TILE % 2 == 0 && 32 % ROW_TILE == 0, "half a tile is a tile, and a strip is whole tiles");
_Static_assert(ROW_TILE_1 % ROW_TILE == 0, "what is left of the tiles of one vector is whole tiles");
_Static_assert(!LANE_MADS || W == 4 || W == 2, "four terms are one or two vectors, and 4 vectors of A are whole rows");
_Static_assert(SUMS % 4 == 0 && SUMS % W == 0, "few rows share their sums by fours, and vectors of them are summed together");
_Static_assert(EXP2_STEPS == 1 || EXP2_STEPS == 8, "exp2_poly.h has no other polynomials");

#include "exp2_tpl.h"
#include "adjust_tpl.h"
#include "attend_tpl.h"
#if PAIR == 1
#include "grad_tpl.h"
#endif
#if !TILE_PARTS
#include "look_tpl.h"
#endif
#include "rows_tpl.h"
#if TILE_PARTS
#include "tile_rows_tpl.h"
#else
#include "peak_tpl.h"
#include "decode_tpl.h"
#endif
#if PAIR == 1 || TILE_PARTS
#include "product_tpl.h"
#endif
#if PAIR == 1
#include "softmax_tpl.h"
#include "rotate_tpl.h"
#include "hadamard_tpl.h"
#include "bytes_tpl.h"
#define UNPAIRED \
    .multiply = X(multiply), .multiply_turned = X(multiply_turned), .fence = X(fence), \
    .softmax_rows = X(softmax_rows), .softmax_columns = X(softmax_columns), \
    .softmax_grad_rows = X(softmax_grad_rows), .softmax_grad_columns = X(softmax_grad_columns), .rotate = X(rotate), \
    .hadamard = X(hadamard), .multiply_row = X(multiply_row), .bound_bytes = X(bound_bytes), \
    .decode_score_columns = X(decode_score_columns), .grad_scores = X(grad_scores), .grad_values = X(grad_values), .finite_rows = X(finite_rows),
#else
#define UNPAIRED
#endif

#if TILE_PARTS
#define OF_REGISTERS \
    .parts = TILE_PARTS, .score_products = X(score_n), .value_products = X(value_n), .aligned = STRIP, \
    .begin = X(begin_tiles), .end = X(end_tiles), .gather_panel = X(gather_panel), .multiply = X(multiply), .fence = X(fence), \
    .fma = X(tile_rounds),
#else
#define OF_REGISTERS \
    .aligned = PAIR, .decode_keys = SUMS, \
    .look_largest = X(look_largest), .look_entropy = X(look_entropy), .look_heaviest = X(look_heaviest), \
    .look_normalisers = X(look_normalisers), .look_received = X(look_received), \
    .look_weights = X(look_weights), .look_sums = X(look_sums), .look_maxima = X(look_maxima), \
    .pour_sums = X(pour_sums), .pour_maxima = X(pour_maxima), \
    .look_rows = X(look_rows), .weigh_row = X(weigh_row), .look_influence = X(look_influence), \
    .centre_values = X(centre_values), .centre_outputs = X(centre_outputs), .distance = X(distance), \
    .widens = WIDENS, \
    .decode_stack = X(decode_stack), .decode_score = X(decode_score), .decode_weigh = X(decode_weigh), \
    .decode_value = X(decode_value), .decode_merge = X(decode_merge), .decode_finish = X(decode_finish), \
    .fma = X(fma_rounds),
#endif

#define KERNELS { \
    .size = sizeof(REAL), .pair = PAIR, .vector = W, .lanes = LANES, .row_tile = ROW_TILE, \
    .attend = X(attend), .reset = X(reset), .merge = X(merge), \
    .pack = X(pack), .expect = X(expect), .finish = X(finish), .finite = X(finite), \
    .gather = X(gather), .scatter = X(scatter), .gather_terms = X(gather_terms), .gather_values = X(gather_values), \
    OF_REGISTERS UNPAIRED \
    .exp2 = X(exp2_array) }

static const qkv_kernels X(kernels) = KERNELS;

#undef KERNELS
#undef OF_REGISTERS
#undef REAL_LARGEST
#undef MOST_ROWS
#undef ROWS
#undef UNPAIRED
#undef LANES
#undef W
#undef VEC
#undef REAL
#undef X
#undef QKV_JOIN
#undef QKV_JOIN2
#undef EXP2_STEPS
#undef BYTES_BY_PAIRS
#undef TILE_PARTS
#undef HALVES_SHARED
#undef HALVES_AHEAD
#undef WIDENS
#undef NARROWS
#undef PAIR
#undef SUMS
#undef LANE_MADS
#undef ROW_TILE_1
#undef ROW_TILE
#undef LANE_VECTORS
#undef T
