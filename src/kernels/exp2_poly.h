/* Coefficients of 2^r on [-1/2, 1/2], lowest first: minimax of the relative error with the constant term held at 1
 * (Remez exchange in 60 digits, then rounded). Evaluated by Horner's rule in their own type:
 *   float32, degree 6: 2.6e-9 before rounding, 8.4e-8 evaluated (0.99 ulp at 1); degree 5 would be 4.9e-7
 *   float64, degree 11: 1.8e-17 before rounding; degree 10 would be 3.0e-16
 */
#ifndef QKV_EXP2_POLY_H
#define QKV_EXP2_POLY_H

static const float exp2_poly_f32[] = {
    0x1p+0f, 0x1.62e432p-1f, 0x1.ebfbe2p-3f, 0x1.c6ae72p-5f, 0x1.3b270ep-7f, 0x1.5f7276p-10f, 0x1.470b4ap-13f,
};

static const double exp2_poly_f64[] = {
    0x1p+0, 0x1.62e42fefa39f3p-1, 0x1.ebfbdff82c598p-3, 0x1.c6b08d7048f31p-5, 0x1.3b2ab6fba1e1cp-7,
    0x1.5d87fe7bbbe07p-10, 0x1.4309130961163p-13, 0x1.ffcbee3b0af8cp-17, 0x1.62bfd49ed0adfp-20,
    0x1.b54167a0b9061p-24, 0x1.e605f979c7a5dp-28, 0x1.c0638527edf34p-32,
};

#endif
