"""`make bench-profile`: profiles the project's own training on this machine.

python -m benchmarks.profile [--device cpu|cuda] [--ranks 1,2] [--steps 40] [--teacher DIR] [section.key=value ...]
python -m benchmarks.profile --report    # docs/performance.md alone

Writes one entry per device and number of ranks to benchmarks/results/profile.json, and Chrome traces (chrome://tracing,
ui.perfetto.dev) to --output.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

from benchmarks import watch
from benchmarks.peers.bench import CONFIG, TEACHER
from pkd_dist.cli.launch import guarded, leave
from pkd_dist.errors import UserError
from pkd_dist.files import remove, write_json
from pkd_dist.telemetry.log import log, to_terminal


def measure(output: Path, device: str, ranks: int, steps: int, overrides: list[str]) -> dict[str, object]:
    """The table of rank 0.

    Raises:
        UserError: the training failed.
    """
    name = f"{device}-{ranks}"
    made, run = output / "made.json", output / f"run-{name}"
    remove(made)
    remove(run / "metrics.jsonl")
    given = {
        "config": str(CONFIG), "overrides": [*overrides, f"run.dir={run}", "metrics.enabled=false"], "steps": steps,
        "output": str(made), "trace": str(output / f"trace-{name}-rank{{rank}}.json.gz"),
    }  # fmt: skip
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    argv = [sys.executable, *starter, "-m", "benchmarks.profile.worker", json.dumps(given)]
    threads = max(1, watch.cores() // ranks)
    hidden = watch.WITHOUT_GPU if device == "cpu" else {}
    log_file = output / f"{name}.log"
    watched = watch.run(argv, log_file, threads, extra=hidden)
    if watched.status:
        raise UserError(f"profile: {name} ended with status {watched.status}; see {log_file}")
    return json.loads(made.read_text()) | {
        "date": datetime.date.today().isoformat(), "processor": watch.processor(), "cores": watch.cores(),
        "waiting_share": round(watched.waiting_share, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--ranks", help="numbers of ranks, separated by commas; default: 1, and on a CPU 2")
    parser.add_argument("--steps", type=int, default=40, help="timed, and then profiled")
    parser.add_argument("--teacher", type=Path, help="a fine-tuned folder; by default one is made in --output")
    parser.add_argument("--output", type=Path, default=Path("runs/profile"))
    parser.add_argument("--results", type=Path, help="file to add to; default: benchmarks/results/profile.json")
    parser.add_argument("--report", action="store_true", help="measure nothing, write docs/performance.md")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the training")
    options = parser.parse_intermixed_args()
    to_terminal(True)

    def work() -> None:
        from benchmarks import performance
        from pkd_dist.model.encoder import locate

        results = options.results or performance.RESULTS / "profile.json"
        output = options.output.resolve()
        output.mkdir(parents=True, exist_ok=True)
        folder = Path(locate(str(options.teacher), "--teacher")).resolve() if options.teacher else None
        teacher = [f"teacher.model={folder}"] if folder else TEACHER
        device = options.device or _found()
        for ranks in (
            [] if options.report else map(int, (options.ranks or ("1,2" if device == "cpu" else "1")).split(","))
        ):
            found = measure(output, device, ranks, options.steps, [*teacher, *options.overrides])
            known = json.loads(results.read_text()) if results.exists() else {}
            write_json(results, known | {f"{device}-{ranks}": found})
            log.info(
                "profile: %s on %d rank(s): %.1f ms a step", device, ranks, 1000 * float(str(found["step_seconds"]))
            )
        if results.parent == performance.RESULTS:
            performance.write()

    leave(guarded(work))


def _found() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
