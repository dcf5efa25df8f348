"""`make bench-peers`: run every contestant in turn, in rounds; rerun the same command to resume."""

from pathlib import Path

from benchmarks import common
from benchmarks.peers.bench import CONTESTANTS, OTHERS, Bench
from pkd_dist.config.paths import project_path
from pkd_dist.errors import UserError
from pkd_dist.telemetry.log import log


def _short(folder: Path, data: str, train: int, dev: int) -> str:
    """Write the first lines of a data set to a new folder, and return that."""
    short = folder / "data"
    short.mkdir(parents=True, exist_ok=True)
    for name, count in (("train.tsv", train), ("dev.tsv", dev)):
        if not (project_path(data) / name).is_file():
            raise UserError(f"--data: {data} has no {name}, which --quick shortens")
        lines = (project_path(data) / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (short / name).write_text("".join(lines[: 1 + count]), encoding="utf-8")
    return str(short)


def main() -> None:
    parser = common.parser("peers", __doc__, "runs/peers", "peers.json; on a GPU peers-cuda.json")
    parser.add_argument("--data", default="data/movie-reviews", help="folder with train.tsv and dev.tsv")
    parser.add_argument("--seeds", type=int, default=3, help="number of rounds, with seeds 1, 2, ...")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of all contestants; one GPU")
    parser.add_argument("--only", help="contestants, separated by commas (default: all; on a GPU those of one rank)")
    parser.add_argument(
        "--slow-steps", type=int, default=100, help="timed steps of contestants that do not train fully"
    )
    parser.add_argument("--slices", action="store_true", help="time all but ours on --slow-steps steps only")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; the results mean nothing")
    parser.add_argument("--report", action="store_true", help="measure nothing, only collect")
    options = parser.parse_intermixed_args()
    everything = (*CONTESTANTS, *OTHERS)
    skipped = ("job",) if options.device == "cpu" else tuple(n for n, c in CONTESTANTS.items() if c.ranks > 1)
    default = ",".join(name for name in everything if name not in skipped)
    only = common.choices(options.only or default, everything, "--only", parser)

    def work() -> None:
        from benchmarks.peers.collect import collect
        from benchmarks.performance import peers_file

        output, data, slow_steps, blocks = options.output.resolve(), options.data, options.slow_steps, (20, 9)
        extra: tuple[str, ...] = ()
        if options.quick:
            data, slow_steps, blocks, extra = _short(output, data, 96, 64), 2, (1, 3), ("train.epochs=1",)
        settings = (f"task.data={data}", *extra, *options.overrides)
        seeds, teacher = tuple(range(1, options.seeds + 1)), common.located(options.teacher)
        bench = Bench(output, teacher, seeds, tuple(only), slow_steps, blocks, settings, options.device, options.slices)
        if not options.report:
            bench.run()
        results = options.results or (output if options.quick else common.RESULTS) / peers_file(options.device)
        common.save(results, collect(bench))
        log.info("peers: %s", results)

    common.run_program(work)


if __name__ == "__main__":
    main()
