/* (tanh(y) / y - 1) / z with z = y^2 on [0, TANH_NEAR]; coefficients lowest first. Minimax of the relative error of
 * y + y z poly(z) against tanh(y) (Remez exchange in 50 digits, then rounded): 1.0e-9 in float32, 2.0e-17 in float64. */
#ifndef QKV_TANH_POLY_H
#define QKV_TANH_POLY_H

#define TANH_NEAR 0.3025              /* |y| <= 0.55: above, 1 - 2 / (e^2y + 1) loses no more than a bit */

static const float tanh_poly_f32[] = {
    -0x1.55554ap-2f, 0x1.110d26p-3f, -0x1.b9287ep-5f, 0x1.593d22p-6f, -0x1.9b30dep-8f,
};

static const double tanh_poly_f64[] = {
    -0x1.555555555549ep-2, 0x1.111111110295dp-3, -0x1.ba1ba1ad70701p-5, 0x1.664f45c2b02acp-6, -0x1.226ddd4437581p-7,
    0x1.d6c61d486b68dp-9, -0x1.7cf3b9f00658ep-10, 0x1.2fa27596588c4p-11, -0x1.b90947173f501p-13, 0x1.abffe695ab9e4p-15,
};

/* Paths whose tables have these names compute in float32. */
#define tanh_poly_bf16 tanh_poly_f32
#define tanh_poly_f16 tanh_poly_f32

#endif
