/* What scores meet by element: a bias, a mask and ids, row by row, and what follows from a row's position and head. */
#ifndef QKV_ELEMENTS_H
#define QKV_ELEMENTS_H

#include "mask.h"
#include "plan.h"

enum { QKV_SEEN = 1, QKV_HIDDEN = 2 };                  /* of a mask's elements: some are */

/* Where the keys [first, last) end that a bias does not hide from a vector of lanes, if last is not 0. */
typedef struct { int64_t first, last, end; } qkv_bias_seen;

/* What the rows of a key head meet; and scratch: rows of bias and mask of the lanes at hand, and where they are copied to, a
 * block of keys each. */
typedef struct {
    const qkv_problem *problem;
    const qkv_plan *plan;
    int64_t sequence, head;           /* head: one of plan->heads */
    int64_t block;
    const uint8_t *summary;           /* of the mask, or NULL */
    const void **bias_rows;
    const uint8_t **mask_rows;
    char *bias_copies, *mask_copies;
    int64_t *kept;                    /* (2, places): of what kind of copies, of the bias or the mask, each has which block, plus 1 */
    qkv_bias_seen *ends;              /* (places, vectors): of a bias that the heads of the task share, else NULL */
    char *key_copies;                 /* positions of a block's keys */
} qkv_elements;

/* Some rows, of each: its row of the bias and of the mask at key 0 and of the mask's summary, its position, slope and id. */
typedef struct {
    int64_t n, place;                 /* rows, and where copies of theirs are kept */
    const char **bias, **mask;
    const uint8_t **summary;
    int64_t *position;
    double *slope;
    int32_t *id;
} qkv_lanes;

/* Lays out lanes from `at` on, QKV_LANE_BYTES each, and fills them in: `n` rows from `row` on, the last of which is repeated in
 * the others of `count` lanes. */
void qkv_open_lanes(const qkv_elements *elements, qkv_lanes *lanes, int64_t row, int64_t n, int64_t count, int64_t place, char *at);

/* Rows [first, last) of a mask's summary. */
void qkv_summarise(const qkv_problem *problem, const qkv_plan *plan, int64_t first, int64_t last, uint8_t *summary);

/* The mask of the lanes [lane, lane + n) for the keys [first, last) of one block. */
void qkv_set_mask(const qkv_elements *elements, const qkv_lanes *lanes, int lane, int n, int64_t first, int64_t last,
                  qkv_changes *to);

/* What the masks of n lanes make of some of their keys, `at` and on: QKV_SEEN, QKV_HIDDEN or both. */
int qkv_look_at(const qkv_changes *changes, int n, int64_t at, int64_t keys);

/* Whether it hides all of these keys (or, with a summary, of their block), some or none; sets it if some. If `to` has the mask of
 * these lanes already, it is that. */
qkv_kind qkv_look(const qkv_elements *elements, const qkv_lanes *lanes, int lane, int n, int64_t first, int64_t last,
                  qkv_changes *to);

/* Where those of the keys [first, last) end that the bias hides from none of n lanes: it is -inf for all of them behind, in whole
 * strips of keys. */
int64_t qkv_bias_end(const qkv_elements *elements, const qkv_lanes *lanes, int lane, int n, int64_t first, int64_t last);

/* All else that changes these scores; after the mask, on which `adjust` depends as well. Positions count from `base`. */
void qkv_set_changes(const qkv_elements *elements, const qkv_lanes *lanes, int lane, int n, int64_t base, int64_t first,
                     int64_t last, qkv_changes *to);

/* Of these keys, those that mask and ids let query i of a beam and head see. */
int64_t qkv_count_seen(const qkv_problem *problem, int64_t sequence, int64_t beam, int64_t head, int64_t i, qkv_range keys);

#endif
