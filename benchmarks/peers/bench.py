"""The contestants, and the measurements of a comparison: one file each, taken once."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import common, watch
from benchmarks.faults.tiny import command
from pkd_dist.errors import UserError
from pkd_dist.files import remove, write_json
from pkd_dist.stages.base import NAMES
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.records import read

STAGES = ("cache", "init", "distill")
"""The stages of our run that count: the teacher's pass, the student's start, training with evaluation and checkpoints."""
JOB = ("export.formats=[safetensors]", "evaluate.latency_samples=20", "evaluate.throughput_samples=64")
"""Settings of `job`: with the defaults, timing the models for the model card takes longer than the export."""


@dataclass(frozen=True)
class Contestant:
    """One implementation, started in one way. Unless `full`, some steps are timed and scaled by tokens.

    `ranks` is 0 for ours under plain python. `scored_by` has the same arithmetic; its full runs give the accuracy.
    `settings` are its own, beside those of all.
    """

    title: str
    role: str
    precision: str
    ranks: int = 1
    full: bool = True
    scored_by: str | None = None
    settings: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        return self.role in ("ours", "recipe")


RECIPE = (
    "student.layers=[1,2,5]", "student.dropout=0", "distill.alpha=0.9", "distill.beta=100", "distill.temperature=5",
    "train.learning_rate=2.5e-4", "train.epochs=1",
)  # fmt: skip
"""For the same teacher and size of student, chosen on the sentences of test (docs/log.md), which no contestant is scored on; all others
have the settings of the paper's authors."""
_TRAINER, _OURS = "Trainer, online teacher, by length", "ours, deepspeed launcher/train.py"
CONTESTANTS = {
    "authors": Contestant("the authors' computation, padded", "authors", "float32", full=False),
    "textbrewer-padded": Contestant("TextBrewer, padded", "peer", "float32", 1, False, "textbrewer-dynamic"),
    "textbrewer-dynamic": Contestant("TextBrewer, dynamic padding", "peer", "float32"),
    "hf-float32": Contestant(_TRAINER, "peer", "float32"),
    "hf-bfloat16": Contestant(_TRAINER, "peer", "bfloat16"),
    "hf-float32-2": Contestant(_TRAINER, "peer", "float32", 2, False, "hf-float32"),
    "hf-bfloat16-2": Contestant(_TRAINER, "peer", "bfloat16", 2, False, "hf-bfloat16"),
    "ours-python": Contestant("ours, python launcher/train.py", "ours", "bfloat16", 0),
    "ours-deepspeed": Contestant(_OURS, "ours", "bfloat16", 1),
    "ours-deepspeed-2": Contestant(_OURS, "ours", "bfloat16", 2),
    "ours-recipe": Contestant("ours, with its own recipe", "recipe", "bfloat16", 0, settings=RECIPE),
}
OTHERS = ("peaks", "engine", "teacher", "job")
"""Peak of matrix multiplications, a step with and without DeepSpeed, the teacher's pass, a run from raw text to its export."""


@dataclass(frozen=True)
class Bench:
    """One comparison in one folder. A contestant that does not train all epochs is timed on `slow_steps` steps.

    `blocks`: of the step with and without DeepSpeed, the steps of a block and the blocks of each kind. `slices`: no
    contestant except ours trains all epochs.
    """

    output: Path
    given_teacher: Path | None
    seeds: tuple[int, ...]
    only: tuple[str, ...]
    slow_steps: int
    blocks: tuple[int, int]
    settings: tuple[str, ...]
    device: str = "cpu"
    slices: bool = False

    def full(self, name: str) -> bool:
        """Return whether a contestant trains all epochs in every round."""
        return CONTESTANTS[name].full and (not self.slices or CONTESTANTS[name].is_ours)

    @property
    def teacher(self) -> Path:
        return self.given_teacher or self.output / "teacher" / "teacher"

    def overrides(self, seed: int) -> list[str]:
        return [*self.settings, f"teacher.model={self.teacher}", f"run.seed={seed}"]

    def run(self) -> None:
        """Take the missing measurements. Raises UserError if one fails, or the folder is of other settings."""
        self.output.mkdir(parents=True, exist_ok=True)
        settings = {
            "teacher": str(self.given_teacher), "slow_steps": self.slow_steps, "blocks": list(self.blocks),
            "overrides": list(self.settings), "device": self.device, "slices": self.slices, "recipe": list(RECIPE),
        }  # fmt: skip
        known = self.output / "settings.json"
        if common.read_json(known) not in ({}, settings):
            raise UserError(f"--output: {self.output} holds measurements of other settings ({known}); choose another")
        write_json(known, settings)
        common.prepared_teacher("peers", self.output, self.given_teacher, self.settings, self.device == "cuda")
        for number, seed in enumerate(self.seeds):
            names = [name for name in CONTESTANTS if name in self.only]
            first = number * len(names) // len(self.seeds)  # each round starts with another contestant
            for name in [*names[first:], *names[:first], *(o for o in OTHERS if o in self.only)]:
                self._measure(name, seed, name in CONTESTANTS and self.full(name))
        for seed in self.seeds if not self.slices else ():
            for name in self.only:
                if name in CONTESTANTS and not self.full(name) and CONTESTANTS[name].scored_by is None:
                    self._measure(name, seed, True)

    def file(self, name: str, seed: int, full: bool) -> Path:
        """Return the file of a measurement; full runs of a contestant that is timed on a slice have their own."""
        extra = "-whole" if full and not self.full(name) else ""
        return self.output / f"seed-{seed}" / f"{name}{extra}.json"

    def _measure(self, name: str, seed: int, full: bool) -> None:
        path = self.file(name, seed, full)
        if path.exists():
            return
        log.info("peers: seed %d: %s%s", seed, name, "" if full or name in OTHERS else f", {self.slow_steps} steps")
        made, run = self.output / "made.json", self.output / "runs" / f"{name}-{seed}"
        remove(made)
        remove(run)  # an interrupted run would resume, and not be timed in full
        overrides = [*self.overrides(seed), f"run.dir={run}"]
        contestant = CONTESTANTS.get(name, Contestant("", "", ""))
        if contestant.is_ours or name == "job":
            more = JOB if name == "job" else (*contestant.settings, "--stages", "data,teacher,cache,init,distill")
            argv = command("--config", common.CONFIG, *overrides, *more, ranks=0 if name == "job" else contestant.ranks)
        else:
            given = {"what": name, "config": str(common.CONFIG), "overrides": overrides, "output": str(made),
                     "steps": None if full else self.slow_steps, "blocks": self.blocks}  # fmt: skip
            argv = common.worker_command("peers.worker", given, contestant.ranks)
        log_file = self.output / "logs" / f"{name}-{seed}.log"
        began = time.time()
        watched = watch.run_checked("peers", argv, log_file, contestant.ranks, self.device == "cuda")
        if contestant.is_ours:
            found = _of_run(run, contestant.ranks)
        elif name == "job":
            found = {"stages": {stage: _marker(run, stage)["seconds"] for stage in NAMES}}
        else:
            found = json.loads(made.read_text())
        shutil.rmtree(run, ignore_errors=True)
        path.parent.mkdir(exist_ok=True)
        measured = {"began": began, "command_seconds": watched.seconds, "peak_bytes": watched.peak_bytes}
        write_json(path, found | measured)


def _marker(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / "stages" / f"{stage}.json").read_text())


def _of_run(run: Path, ranks: int) -> dict[str, Any]:
    records = list(read(run / "metrics.jsonl"))
    paces = [1 / record["samples_per_second"] for record in records if "split" not in record]
    distilled = _marker(run, "distill")["outputs"]
    resolved = yaml.safe_load((run / "config.yaml").read_text())["resolved"]
    return {
        "seconds": {stage: _marker(run, stage)["seconds"] for stage in STAGES},
        "training_seconds": distilled["samples"] * sum(paces) / len(paces),
        "epochs": [
            {"accuracy": each["main_metric"], "agreement": each["agreement"], "at": each["time"]}
            for each in records
            if "split" in each
        ],
        "precision": "bfloat16" if "bfloat16" in resolved["precision"] else "float32",
        "ranks": max(1, ranks), "threads": max(1, watch.cores() // max(1, ranks)),
    }  # fmt: skip
