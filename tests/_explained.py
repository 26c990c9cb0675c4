"""What a call is said to do, and what it does."""

import qkv_fast
from qkv_fast import _runtime

COUNTED = ("tiles_full", "tiles_partial", "tiles_skipped", "tiles_copied", "tasks")


def agree(q, k, v, **options):
    """Explain a call, make it, and compare. Returns the plan."""
    plan = qkv_fast.explain(q, k, v, **options)
    with _runtime.counters() as did:
        qkv_fast.attention(q, k, v, **options)
    assert {name: getattr(plan, name) for name in COUNTED} == {name: did[name] for name in COUNTED}
    # A call of less work than this does without threads that sleep.
    assert did["threads"] == plan.threads or (plan.operations < 6e6 and did["threads"] < plan.threads)
    assert did["splits"] == (plan.tasks if plan.split else 0) and did["panels_careful"] == 0
    return plan
