"""Run the whole job at a small size, disturb it, rerun the same command, and compare with an undisturbed run."""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, choices
from benchmarks.faults.campaign import COUNTED, Campaign
from benchmarks.faults.job import Interrupted, Watch
from benchmarks.faults.plan import WEIGHTS
from benchmarks.faults.trial import Row
from pkd_dist.errors import UserError
from pkd_dist.files import write_json

NEEDS_ROOT = {"cut-link": ("ip", "taskset"), "fill-disk": ("mount", "umount")}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=50, metavar="N", help="trials of the campaign (50)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="(seed, number) determines a trial (0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at a time (1)")
    parser.add_argument("--faults", default=",".join(WEIGHTS), metavar="a,b", help=f"of {', '.join(WEIGHTS)}")
    parser.add_argument("--trial", type=int, metavar="K", help="repeat this trial only, and keep its folder")
    parser.add_argument("--work", type=Path, metavar="DIR", help="work folder (runs/faults-seed-S)")
    parser.add_argument("--output", type=Path, default=RESULTS / "faults.json", metavar="FILE")
    options = parser.parse_args(argv)
    options.faults = choices(options.faults, WEIGHTS, "--faults", parser)
    for fault, tools in NEEDS_ROOT.items():
        if fault in options.faults and (os.geteuid() or not all(map(shutil.which, tools))):
            parser.error(f"{fault} needs root and {', '.join(tools)}; choose other faults with --faults")
    return options


def show(row: Row) -> str:
    """Return one line: what was done, how it went, and what failed."""
    wrong = [f"NOT {name}" for name in ("recovered", "identical") if not getattr(row, name)] + ["HUNG"] * row.hung
    wrong += [f"LEFT BEHIND {path}" for path in row.left_behind] + [f"PROMISE: {text}" for text in row.broken_promises]
    how = f"statuses {' '.join(map(str, row.statuses))}, {row.seconds:.0f} s"
    return "; ".join([f"{row.fault} at {row.moment}, {row.detail or 'did not strike'}", how, *wrong])


def main(argv: list[str]) -> int:
    """Return 0: every trial is good; 1: some are not; 2: cannot run as requested; 130: stopped."""
    options = parse(argv)
    watch = Watch()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: watch.stop.set())
    work = options.work or ROOT / f"runs/faults-seed-{options.seed}"
    try:
        print(f"work folder {work}; the undisturbed run comes first", flush=True)
        campaign = Campaign(work, options.seed, 2, options.faults, watch)
        if options.trial is not None:
            row, folder = campaign.run_plan(campaign.draw(options.trial), keep=True)
            print(f"{json.dumps(dataclasses.asdict(row), indent=2)}\nkept in {folder}")
            return 0 if row.good else 1
        for row in campaign.run(options.trials, options.jobs):
            print(f"[{len(campaign.rows())}/{options.trials}] trial {row.trial}: {show(row)}", flush=True)
        summary = campaign.summary(options.trials)
    except UserError as error:
        print(f"faults: {error}", file=sys.stderr)
        return 2
    except Interrupted:
        print(f"faults: stopped; rerun the same command to resume from {work}", file=sys.stderr)
        return 130
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, summary)
    counts = ", ".join(f"{summary[name]} {name.replace('_', ' ')}" for name in COUNTED[:5])
    print(f"{summary['trials']} trials: {counts}; {options.output}")
    return 0 if summary["good"] == summary["trials"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
