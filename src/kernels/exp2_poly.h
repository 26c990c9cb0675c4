/* (2^r - 1) / r for the fractions that remain after rounding to a multiple of 1/steps, |r| <= 1/(2 steps); coefficients
 * lowest first. Minimax of the relative error of 1 + r poly(r) against 2^r (Remez exchange in 50 digits, then rounded):
 *
 *   type, steps   degree of 1 + r poly(r)   error   evaluated in its type
 *   float32, 8                          3   2.5e-8                 1.2e-7
 *   float32, 1                          6   2.0e-9                 8.5e-8
 *   float64, 8                          7   2.8e-18                2.0e-16
 *   float64, 1                         11   3.4e-18                1.7e-16
 */
#ifndef QKV_EXP2_POLY_H
#define QKV_EXP2_POLY_H

static const float exp2_poly_f32_8[] = {0x1.62e432p-1f, 0x1.ec0c32p-3f, 0x1.c6a004p-5f};

static const float exp2_poly_f32_1[] = {
    0x1.62e430p-1f, 0x1.ebfbdcp-3f, 0x1.c6aee8p-5f, 0x1.3b2d4cp-7f, 0x1.5f3e52p-10f, 0x1.41fbbep-13f,
};

static const double exp2_poly_f64_8[] = {
    0x1.62e42fefa39efp-1, 0x1.ebfbdff82c797p-3, 0x1.c6b08d70495edp-5, 0x1.3b2ab6ef4d64dp-7,
    0x1.5d87fea1570b1p-10, 0x1.430e65bf7738cp-13, 0x1.ffc4587b719ecp-17,
};

static const double exp2_poly_f64_1[] = {
    0x1.62e42fefa39efp-1, 0x1.ebfbdff82c5a4p-3, 0x1.c6b08d7049fe8p-5, 0x1.3b2ab6fba011ap-7, 0x1.5d87fe78cd6d0p-10,
    0x1.4309130ed8cc5p-13, 0x1.ffcbfba980c86p-17, 0x1.62bfc79d4e3edp-20, 0x1.b5267ce057c75p-24, 0x1.e61b4f94a2202p-28,
    0x1.e79bb61d45e39p-32,
};

/* Paths whose tables have these names compute in float32. */
#define exp2_poly_bf16_1 exp2_poly_f32_1
#define exp2_poly_bf16_8 exp2_poly_f32_8
#define exp2_poly_f16_1 exp2_poly_f32_1
#define exp2_poly_f16_8 exp2_poly_f32_8

#endif
