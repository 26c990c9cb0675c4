/* Permission for tiles: asked for once, before the first call that would use them, and where it is refused the path behind computes.
 * The system is not asked here: paths that are emulated need no permission, and are asked by what takes its place. */
#include "problem.h"

static int asked, answer;

static int ask(void)
{
    asked++;
    return answer;
}

static void test_permission(int isa)
{
    qkv_report report;
    int known;
    problem x = make(QKV_F32, 2, 2, 1, 70, 90, 40, 33);
    x.p.isa = isa;
    for (answer = 0; answer < 2; answer++) {
        asked = 0;
        qkv_ask_instead(ask);
        CHECK(qkv_tiles_refusal(&known) == 0 && !known && !asked, "asked before any call");
        for (x.p.threads = 1; x.p.threads <= 3; x.p.threads++) {
            CHECK(run(&x) == QKV_OK, "%s", qkv_isa_name(isa));
            check_result(&x, qkv_isa_name(isa));
        }
        CHECK(asked == 1, "asked %d times", asked);
        CHECK(qkv_tiles_refusal(&known) == answer && known, "the answer was forgotten");
        CHECK(qkv_explain(&x.p, &report) == QKV_OK && (report.parts != 0) == !answer, "%d parts", (int)report.parts);
        CHECK((qkv_tile_rate(isa, 1, 1e-3) > 0) == !answer && asked == 1, "a rate of tiles that are refused");
    }
    destroy(&x);
    qkv_ask_instead(NULL);
}

/* Few rows and float64 have no tiles, and ask for nothing. */
static void test_nothing_to_ask(int isa)
{
    asked = 0;
    qkv_ask_instead(ask);
    for (int i = 0; i < 2; i++) {
        problem x = make(i ? QKV_F32 : QKV_F64, 1, 1, 1, i ? 1 : 70, 90, 40, 33);
        x.p.isa = isa;
        CHECK(run(&x) == QKV_OK && asked == 0, "asked for tiles that are not used");
        destroy(&x);
    }
    qkv_ask_instead(NULL);
}

int main(void)
{
    for (int isa = 0; tested_path(isa); isa++) {
        test_nothing_to_ask(isa);
        if (!strncmp(qkv_isa_name(isa), "amx", 3))
            test_permission(isa);
    }
    qkv_pool_stop();
    qkv_trim();
    printf("test_tiles: %ld checks passed\n", checks);
    return 0;
}
