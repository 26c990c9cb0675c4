/* Sequences that share their keys, as beams over one prompt, become rows of one: K and V are then read once for all of them, as
 * they are for the heads of a group.
 *
 * Beams are an axis along which K and V do not move. It leaves the axes of the problem, and its strides become those of `beam`.
 * All that is known by sequence stays where it is, and qkv_given() finds it.
 */
#include "beams.h"

#include <string.h>

#include "mask.h"

/* Whether n things of some bytes each, one for every sequence, are equal for all beams; or there are none. */
static int are_shared(const void *things, size_t bytes, const qkv_problem *p, int64_t sequences)
{
    const char *x = things;
    for (int64_t i = 0; x && i < sequences; i++)
        if (memcmp(x + (size_t)i * bytes, x + (size_t)(i - i / p->beam_step % p->beams * p->beam_step) * bytes, bytes) != 0)
            return 0;
    return 1;
}

/* Whether all beams have the runs of the first. */
static int are_runs_shared(const qkv_problem *p, int64_t sequences)
{
    const int64_t *run_of = p->run_of;
    for (int64_t i = 0; run_of && i < sequences; i++) {
        int64_t first = i - i / p->beam_step % p->beams * p->beam_step, count = run_of[i + 1] - run_of[i];
        if (run_of[first + 1] - run_of[first] != count
            || (count > 0 && memcmp(p->runs + run_of[i], p->runs + run_of[first], (size_t)count * sizeof *p->runs) != 0))
            return 0;
    }
    return 1;
}

static void move_axis(qkv_strides *at, int axis, int n_axes)
{
    at->beam = at->axis[axis];
    memmove(at->axis + axis, at->axis + axis + 1, (size_t)(n_axes - axis - 1) * sizeof *at->axis);
}

const qkv_problem *qkv_fold(const qkv_problem *p, qkv_problem *room)
{
    int found = -1;                   /* the axis with the most beams; where all lie in runs the last of several */
    if (p->run_of && p->n_axes > 1)
        found = p->n_axes - 1;
    for (int i = 0; i < p->n_axes && !p->run_of; i++)
        if (!p->k_at.axis[i] && !p->v_at.axis[i] && p->axes[i] > (found < 0 ? 1 : p->axes[found]))
            found = i;
    if (found < 0 || p->question || p->q_starts || p->queries || p->spans || p->mask_from)
        return p;
    int64_t sequences = 1;
    *room = *p;
    room->beams = p->axes[found];
    room->beam_step = 1;
    for (int i = 0; i < p->n_axes; i++) {
        if (p->axes[i] == 0 || sequences > INT64_MAX / p->axes[i])
            return p;
        sequences *= p->axes[i];
        room->beam_step *= i > found ? p->axes[i] : 1;
    }
    if (!are_shared(p->length, sizeof *p->length, room, sequences) || !are_shared(p->offset, sizeof *p->offset, room, sequences)
        || !are_shared(p->start, sizeof *p->start, room, sequences)
        || !are_shared(p->positions, (size_t)p->len_q * sizeof *p->positions, room, sequences)
        || !are_runs_shared(room, sequences))
        return p;
    qkv_strides *at[] = {&room->q_at, &room->k_at, &room->v_at, &room->out_at, &room->bias_at, &room->mask_at};
    for (size_t i = 0; i < sizeof at / sizeof *at; i++)
        move_axis(at[i], found, p->n_axes);
    memmove(room->axes + found, room->axes + found + 1, (size_t)(p->n_axes - found - 1) * sizeof *room->axes);
    room->n_axes--;
    return room;
}
