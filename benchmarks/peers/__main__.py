"""`make bench-peers`: every contestant in turn, round after round; goes on where it was stopped.

python -m benchmarks.peers [--teacher DIR] [--output runs/peers] [--seeds 3] [--only NAME,...] [--device cuda] [--quick]
python -m benchmarks.peers --report      # benchmarks/results/peers.json and docs/performance.md from what is measured
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.peers.bench import CONTESTANTS, OTHERS, Bench
from pkd_dist.cli.launch import guarded, leave
from pkd_dist.config.paths import project_path
from pkd_dist.errors import UserError
from pkd_dist.files import write_json
from pkd_dist.telemetry.log import log, to_terminal


def _short(folder: Path, data: str, train: int, dev: int) -> str:
    """The first lines of a data set, in a folder of their own."""
    short = folder / "data"
    short.mkdir(parents=True, exist_ok=True)
    for name, count in (("train.tsv", train), ("dev.tsv", dev)):
        if not (project_path(data) / name).is_file():
            raise UserError(f"--data: {data} has no {name}, which --quick shortens")
        lines = (project_path(data) / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (short / name).write_text("".join(lines[: 1 + count]), encoding="utf-8")
    return str(short)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--teacher", type=Path, help="a fine-tuned folder; by default one is made first")
    parser.add_argument("--data", default="data/movie-reviews", help="folder with train.tsv and dev.tsv")
    parser.add_argument("--output", type=Path, default=Path("runs/peers"), help="every measurement is a file in it")
    parser.add_argument("--seeds", type=int, default=3, help="rounds, a seed each: 1, 2, ...")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of all contestants; of GPUs one")
    parser.add_argument("--only", help="contestants, separated by commas; default: all, on a GPU those of one rank")
    parser.add_argument("--slow-steps", type=int, default=100, help="timed steps of a contestant that is not run whole")
    parser.add_argument(
        "--slices", action="store_true", help="time all but ours on such steps; their accuracy stays open"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of everything; nothing that it says is a result"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="file to write; default: benchmarks/results/peers.json (a GPU: peers-cuda.json), with --quick in OUTPUT",
    )
    parser.add_argument("--report", action="store_true", help="measure nothing, only collect")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all contestants")
    options = parser.parse_intermixed_args()
    both = [name for name in (*CONTESTANTS, *OTHERS) if name != "job"]
    alone = [name for name in (*CONTESTANTS, *OTHERS) if name not in CONTESTANTS or CONTESTANTS[name].ranks < 2]
    only = options.only.split(",") if options.only else both if options.device == "cpu" else alone
    if unknown := [name for name in only if name not in (*CONTESTANTS, *OTHERS)]:
        parser.error(f"--only: {unknown[0]!r} is not known; allowed: {', '.join([*CONTESTANTS, *OTHERS])}")
    to_terminal(True)

    def work() -> None:
        from benchmarks import performance
        from benchmarks.peers.collect import collect
        from pkd_dist.model.encoder import locate

        output, data, slow_steps, blocks = options.output.resolve(), options.data, options.slow_steps, (20, 9)
        overrides = options.overrides
        if options.quick:
            data, slow_steps, blocks = _short(output, data, 96, 64), 2, (1, 3)
            overrides = ["train.epochs=1", *overrides]
        seeds = tuple(range(1, options.seeds + 1))
        teacher = Path(locate(str(options.teacher), "--teacher")).resolve() if options.teacher else None
        bench = Bench(output, teacher, data, seeds, tuple(only), slow_steps, blocks, tuple(overrides), options.device,
                      options.slices)  # fmt: skip
        if not options.report:
            bench.run()
        results = options.results or (output if options.quick else performance.RESULTS) / performance.peers_file(
            options.device
        )
        write_json(results, collect(bench))
        log.info("peers: %s", results)
        if results.parent == performance.RESULTS:
            performance.write()

    leave(guarded(work))


if __name__ == "__main__":
    main()
