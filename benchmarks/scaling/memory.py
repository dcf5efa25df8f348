"""Measure the memory of a rank, and the time of an example, on the embedded data once, 10 and 100 times.

Each copy of a sentence has one word changed, so that all texts, ids and cache rows differ. For each size the stages
data, cache and distill (stopped by SIGTERM after --steps steps) run as separate commands through the real launcher.
Every finished size is a file in --output. Adds `memory` to benchmarks/results/scaling.json.
"""

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, watch
from benchmarks.faults.tiny import command
from pkd_dist.config.paths import project_path
from pkd_dist.errors import UserError
from pkd_dist.files import remove, write_json
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.records import read

SETTLED = 20
"""Steps that are not timed because memory is still being allocated."""


def multiply(source: Path, folder: Path, factor: int) -> None:
    """Copy dev.tsv, and write train.tsv with `factor` times the rows; later copies have one word replaced."""
    for name in ("train.tsv", "dev.tsv"):
        if not (source / name).is_file():
            raise UserError(f"--data: {source} has no {name}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dev.tsv").write_bytes((source / "dev.tsv").read_bytes())
    head, *rows = (source / "train.tsv").read_text(encoding="utf-8").splitlines()
    text_at = head.split("\t").index("sentence")
    words = sorted({word for row in rows for word in row.split("\t")[text_at].split()})
    rng = random.Random(0)
    with open(folder / "train.tsv", "w", encoding="utf-8") as file:
        file.write(head + "\n")
        for copy in range(factor):
            for row in rows:
                fields = row.split("\t")
                if copy:
                    changed = fields[text_at].split()
                    changed[rng.randrange(len(changed))] = rng.choice(words)
                    fields[text_at] = " ".join(changed)
                file.write("\t".join(fields) + "\n")


def of_ranks(watched: watch.Watched, seconds_per_example: float) -> dict[str, float]:
    """Return the maximum over the ranks of each kind of memory, in bytes, and the time of an example."""
    ranks = [asdict(found) for found in watched.memory.values() if watch.is_rank(found.command)]
    largest = {f"{name}_bytes": max(found[name] for found in ranks) for name in ("peak", "anonymous", "file")}
    return largest | {"waiting_share": watched.waiting_share, "seconds_per_example": seconds_per_example}


def measure(source: Path, output: Path, factor: int, ranks: int, steps: int, overrides: list[str]) -> dict[str, Any]:
    """Run the stages at `factor` times the data. Raises UserError if one fails."""
    data, run = output / f"data-{factor}", output / f"run-{factor}"
    remove(run)
    multiply(source, data, factor)
    settings = [*overrides, f"task.data={data}", f"run.dir={run}", "metrics.enabled=false"]

    def enough() -> bool:
        return (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_bytes().splitlines()) >= steps

    def stages(names: str, ranks: int) -> watch.Watched:
        argv = command("--config", common.CONFIG, *settings, "--stages", names, ranks=ranks)
        log_file = output / "logs" / f"{factor}-{names.rpartition(',')[2]}.log"
        return watch.run_checked("scaling", argv, log_file, ranks, False, 0.25, enough)

    watched = stages("data,teacher", 0)
    data_marker = common.read_json(run / "stages/data.json")
    examples = data_marker["outputs"]["sets"]["train"]["examples"]
    out: dict[str, Any] = {
        "factor": factor, "examples": examples, "tokens": common.read_json(run / "data/train/meta.json")["tokens"],
        "data": of_ranks(watched, data_marker["seconds"] / examples),
    }  # fmt: skip
    watched = stages("data,teacher,cache", ranks)
    out["cache"] = of_ranks(watched, common.read_json(run / "stages/cache.json")["seconds"] / examples)
    out["cache_bytes"] = sum(path.stat().st_size for path in (run / "cache").rglob("*") if path.is_file())
    watched = stages("data,teacher,cache,init,distill", ranks)
    paces = [1 / r["samples_per_second"] for r in read(run / "metrics.jsonl") if "split" not in r]
    settled = float(np.median(paces[min(SETTLED, len(paces) // 2) :]))
    out["distill"] = of_ranks(watched, settled) | {"steps": len(paces)}
    remove(run)
    remove(data)
    return out


def main() -> None:
    parser = common.parser("scaling.memory", __doc__, "runs/scaling", "scaling.json")
    parser.add_argument("--factors", default="1,10,100", help="multiples of the data, separated by commas")
    parser.add_argument("--ranks", type=int, default=2, help="for cache and distill, under deepspeed; 0: python")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each size, less than an epoch")
    parser.add_argument("--data", default="data/movie-reviews", help="folder with train.tsv and dev.tsv")
    options = parser.parse_intermixed_args()

    def work() -> None:
        from pkd_dist.model.encoder import load_config
        from pkd_dist.model.families import num_layers

        output, source, sizes = options.output.resolve(), project_path(options.data), []
        teacher = common.prepared_teacher("scaling", output, common.located(options.teacher), options.overrides)
        overrides = [f"teacher.model={teacher}", *options.overrides]
        for factor in map(int, options.factors.split(",")):
            kept = output / f"memory-{factor}-ranks-{options.ranks}.json"
            if not kept.exists():
                log.info("scaling: %d times the data", factor)
                write_json(kept, measure(source, output, factor, options.ranks, options.steps, overrides))
            sizes.append(json.loads(kept.read_text()))
        made = common.stamp() | {
            "ranks": max(1, options.ranks), "overrides": options.overrides, "sizes": sizes,
            "teacher_layers": num_layers(load_config(str(teacher), "--teacher")),
        }  # fmt: skip
        results = options.results or common.RESULTS / "scaling.json"
        common.save(results, common.read_json(results) | {"memory": made})

    common.run_program(work)


if __name__ == "__main__":
    main()
