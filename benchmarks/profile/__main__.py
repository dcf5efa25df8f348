"""`make bench-profile`: profile the training on this machine; writes results/profile.json, and Chrome traces to --output."""

import json
from pathlib import Path
from typing import Any

from benchmarks import common, watch
from pkd_dist.files import remove
from pkd_dist.telemetry.log import log


def measure(output: Path, device: str, ranks: int, steps: int, overrides: list[str]) -> dict[str, Any]:
    """Return the table of rank 0. Raises UserError if the training fails."""
    name = f"{device}-{ranks}"
    made, run = output / "made.json", output / f"run-{name}"
    remove(made)
    remove(run / "metrics.jsonl")
    given = {
        "config": str(common.CONFIG), "overrides": [*overrides, f"run.dir={run}", "metrics.enabled=false"],
        "steps": steps, "output": str(made), "trace": str(output / f"trace-{name}-rank{{rank}}.json.gz"),
    }  # fmt: skip
    argv = common.worker_command("profile.worker", given, ranks)
    watch.run_checked("profile", argv, output / f"{name}.log", ranks, device == "cuda")
    return json.loads(made.read_text()) | common.stamp()


def main() -> None:
    parser = common.parser("profile", __doc__, "runs/profile", "profile.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--ranks", help="numbers of ranks, separated by commas (default: 1, on a CPU 1,2)")
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed, and then profiled")
    options = parser.parse_intermixed_args()

    def work() -> None:
        import torch

        results, output = options.results or common.RESULTS / "profile.json", options.output.resolve()
        output.mkdir(parents=True, exist_ok=True)
        folder = common.located(options.teacher)
        teacher = [f"teacher.model={folder}"] if folder else common.TEACHER
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        for ranks in map(int, (options.ranks or ("1,2" if device == "cpu" else "1")).split(",")):
            found = measure(output, device, ranks, options.steps, [*teacher, *options.overrides])
            common.save(results, common.read_json(results) | {f"{device}-{ranks}": found})
            log.info("profile: %s, %d rank(s): %.1f ms a step", device, ranks, 1000 * found["step_seconds"])

    common.run_program(work)


if __name__ == "__main__":
    main()
