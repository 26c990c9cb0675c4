/* kernel_tpl.h for a path with tiles, of a unit or of its emulation: the parameters that both have. Panels are two tiles wide, and what
 * is left to rows of registers is a careful run. T, TILE_PARTS and EXP2_STEPS are the file's that includes it. */
#define LANE_VECTORS 2
#define ROW_TILE 32
#define ROW_TILE_1 32
#define LANE_MADS 0
#define SUMS 16
#define PAIR 2
#define NARROWS 1
#define WIDENS 0
#include "kernel_tpl.h"
