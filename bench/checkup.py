"""`qkv-fast`: the configuration, the self-check of every CPU path, and a few workloads against plain NumPy."""

from __future__ import annotations

import sys
import time

import qkv_fast

from . import cases, options, record, report, runner, selfcheck, verdict, work
from .outcome import EXIT_USAGE, Outcome
from .progress import Progress
from .tables import show

MOST_ROUNDS = 15


def check_and_time(argv: list[str]) -> int:
    args = options.main_parser().parse_args(argv)
    try:
        options.check_writable(args.json)
    except ValueError as error:
        print(f"qkv-fast: {error}", file=sys.stderr)
        return EXIT_USAGE
    outcome = Outcome([*argv])
    print(report.machine_text(outcome.machine), end="\n\n", flush=True)
    # Small workloads first: what they leave of the time goes to the large ones.
    chosen = sorted(cases.select("main"), key=work.flops)
    jobs = runner.plan(chosen, [qkv_fast.get_num_threads()])
    paths = qkv_fast.available_isas()
    with Progress(len(paths) + len(jobs)) as progress, outcome.interruptible():
        for isa in paths:
            progress.step(f"checking path {isa} against the reference")
            outcome.checks += selfcheck.run(isa)
        start = time.monotonic()
        for done, job in enumerate(jobs):
            progress.step(f"timing {job}")
            left = max(0.0, args.seconds - (time.monotonic() - start))
            share = left / (len(jobs) - done)
            # On a machine that is too slow or too busy for the time, every workload still gets its round.
            how = runner.How(("numpy",), seconds=share, rounds=(3 if share > 0.5 else 1, MOST_ROUNDS))
            outcome.rows += runner.run([job], how)
    show(report.checks_table(outcome.checks))
    outcome.rows.sort(key=lambda row: [c.name for c in cases.CASES].index(row.job.case.name))
    show(report.speed_table(outcome.rows, ["numpy"], "Attention against plain NumPy", goals=False))
    print(verdict.sentence(outcome.rows, outcome.checks))
    if args.json:
        record.save(args.json, outcome.data())
    return outcome.status()
