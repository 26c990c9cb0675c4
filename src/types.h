/* Types of elements: what they take in memory, and what they are computed in. */
#ifndef QKV_TYPES_H
#define QKV_TYPES_H

#include "kernels/kernels.h"
#include "qkv.h"

/* Bytes of an element, 1 where rows are bytes. */
static inline int qkv_size(qkv_type type) { return type == QKV_F64 ? 8 : type == QKV_F32 ? 4 : type < QKV_I8 ? 2 : 1; }

/* Bytes of a row of `dim` elements, with its scales. */
static inline int64_t qkv_row_bytes(qkv_type type, int64_t dim)
{
    return type == QKV_I8 ? qkv_i8_bytes(dim) + 4 : type == QKV_I4 ? qkv_i4_bytes(dim) / 8 * 9 : dim * qkv_size(type);
}

/* Bytes of a token's key and value. */
static inline int64_t qkv_token_bytes(const qkv_problem *p)
{
    return qkv_row_bytes(p->k_type, p->dim) + (p->latent ? 0 : qkv_row_bytes(p->v_type, p->dim_v));
}

/* Bytes in front of the scales of a row of K or V, if these are of I8 or I4. */
static inline int64_t qkv_scales_at(const qkv_problem *p, int values)
{
    int64_t dim = values && !p->latent ? p->dim_v : p->dim;
    return (values ? p->v_type : p->k_type) == QKV_I8 ? qkv_i8_bytes(dim) : qkv_i4_bytes(dim);
}

/* Rows of K or V from `data` on. */
static inline qkv_rows qkv_rows_at(const qkv_problem *p, int values, char *data)
{
    const qkv_strides *at = values ? &p->v_at : &p->k_at;
    qkv_type type = values ? p->v_type : p->k_type;
    int64_t col = type >= QKV_I8 ? qkv_scales_at(p, values) : at->dim;
    return (qkv_rows){data, (ptrdiff_t)at->row, (ptrdiff_t)col, (int)type, values ? p->swapped_v : p->swapped_k};
}

/* The type of products and sums. */
static inline qkv_type qkv_arithmetic(qkv_type type) { return type == QKV_F64 ? QKV_F64 : QKV_F32; }

#endif
