"""What a call is said to do, and what it does."""

import qkv_fast
from qkv_fast import _runtime

COUNTED = ("tiles_full", "tiles_partial", "tiles_skipped", "tiles_copied", "tasks")


def agree(*call, **options):
    """Explain a call of attention, or of the function that is given first, make it, and compare. Returns the plan."""
    plan = qkv_fast.explain(*call, **options)
    function, *arguments = call if callable(call[0]) else (qkv_fast.attention, *call)
    with _runtime.counters() as did:
        function(*arguments, **options)
    # The plan of a stage knows of no tiles that are full, partial or skipped, and the call counts none.
    assert {name: getattr(plan, name, 0) for name in COUNTED} == {name: did[name] for name in COUNTED}
    # A call of little work does without threads that sleep.
    small = not hasattr(plan, "stage") and plan.operations < 6e6
    assert did["threads"] == plan.threads or (small and did["threads"] < plan.threads), (did, plan)
    assert did["splits"] == (plan.tasks if getattr(plan, "split", False) else 0) and did["panels_careful"] == 0
    return plan
