"""The contestants, and the measurements of a comparison: one file each, taken once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import common, watch
from benchmarks.faults.tiny import command
from pkd_dist.errors import UserError
from pkd_dist.files import remove, write_json
from pkd_dist.telemetry.log import log

STAGES = ("cache", "init", "distill")
"""The stages of our run that count: the teacher's pass, the student's start, training with evaluation and checkpoints."""
FEW_TIMINGS = ("evaluate.latency_samples=20", "evaluate.throughput_samples=64")
"""Settings of `job`: with the defaults, timing the models for the model card takes longer than the export."""


@dataclass(frozen=True)
class Contestant:
    """One implementation, started in one way.

    Attributes:
        ranks: 0 for ours under plain python, else the processes that a launcher starts.
        full: trains all epochs in every round; else some steps, scaled by tokens.
        scored_by: contestant with the same arithmetic whose full runs give the accuracy; None: its own.
    """

    title: str
    role: str
    precision: str
    ranks: int = 1
    full: bool = True
    scored_by: str | None = None


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
}
OTHERS = ("peaks", "engine", "teacher", "job")
"""Further measurements of every round: peak of matrix products, a step with and without DeepSpeed, the teacher's pass
alone, and a run from raw text to its verified export."""


@dataclass(frozen=True)
class Bench:
    """One comparison in one folder.

    Attributes:
        given_teacher: fine-tuned folder; None: one is fine-tuned first.
        only: participants, from `CONTESTANTS` and `OTHERS`.
        slow_steps: timed steps of a contestant that does not train all epochs.
        blocks: of the step with and without DeepSpeed: steps of a block, and blocks of each kind.
        settings_of_all: section.key=value, for every contestant.
        device: cpu or cuda (one GPU).
        slices: time every contestant except ours on `slow_steps` steps only.
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

    def full(self, name: str) -> bool:
        """Return whether a contestant trains all epochs in every round."""
        return CONTESTANTS[name].full and (not self.slices or CONTESTANTS[name].role == "ours")

    @property
    def teacher(self) -> Path:
        return self.given_teacher or self.output / "teacher" / "teacher"

    @property
    def _common(self) -> list[str]:
        return [f"task.data={self.data}", *self.settings_of_all]

    def overrides(self, seed: int) -> list[str]:
        return [*self._common, f"teacher.model={self.teacher}", f"run.seed={seed}"]

    def run(self) -> None:
        """Take the measurements that are missing.

        Raises:
            UserError: a contestant failed, or the folder holds measurements with other settings.
        """
        self._open()
        common.prepared_teacher("peers", self.output, self.given_teacher, self._common, self.device == "cuda")
        for number, seed in enumerate(self.seeds):
            names = [name for name in CONTESTANTS if name in self.only]
            first = number * len(names) // len(self.seeds)  # each round starts with another contestant
            for name in [*names[first:], *names[:first], *(o for o in OTHERS if o in self.only)]:
                self._measure(name, seed, name in CONTESTANTS and self.full(name))
        for seed in self.seeds if not self.slices else ():
            for name in self.only:
                if name in CONTESTANTS and not self.full(name) and CONTESTANTS[name].scored_by is None:
                    self._measure(name, seed, True)

    def _open(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        settings = {
            "teacher": str(self.given_teacher), "slow_steps": self.slow_steps, "blocks": list(self.blocks),
            "overrides": self._common, "device": self.device, "slices": self.slices,
        }  # fmt: skip
        known = self.output / "settings.json"
        if not known.exists():
            write_json(known, settings)
        elif json.loads(known.read_text()) != settings:
            raise UserError(f"--output: {self.output} holds measurements of other settings ({known}); choose another")

    def file(self, name: str, seed: int, full: bool) -> Path:
        """Return the file of a measurement; full runs of a contestant that is timed on a slice have their own."""
        extra = "-whole" if full and not self.full(name) else ""
        return self.output / f"seed-{seed}" / f"{name}{extra}.json"

    def _measure(self, name: str, seed: int, full: bool) -> None:
        path = self.file(name, seed, full)
        if path.exists():
            return
        log.info("peers: seed %d: %s%s", seed, name, "" if full or name in OTHERS else f", {self.slow_steps} steps")
        ours = name in CONTESTANTS and CONTESTANTS[name].role == "ours"
        measure = self._ours if ours else self._job if name == "job" else self._worker
        found, watched = measure(name, seed, full)
        path.parent.mkdir(exist_ok=True)
        extra = {"command_seconds": watched.seconds, "peak_bytes": watched.peak_bytes,
                 "largest_process_bytes": max((m.peak for m in watched.memory.values()), default=0),
                 "waiting_share": round(watched.waiting_share, 3), "whole": full}  # fmt: skip
        write_json(path, found | extra)

    def _watched(self, argv: Sequence[str | Path], name: str, seed: int, ranks: int = 1) -> watch.Watched:
        log_file = self.output / "logs" / f"{name}-{seed}.log"
        return watch.run_checked("peers", argv, log_file, ranks, self.device == "cuda")

    def _worker(self, name: str, seed: int, full: bool) -> tuple[dict[str, Any], watch.Watched]:
        ranks = CONTESTANTS[name].ranks if name in CONTESTANTS else 1
        made, scratch = self.output / "made.json", self.output / "runs" / f"{name}-{seed}"
        remove(made)
        remove(scratch)
        given = {
            "what": name, "config": str(common.CONFIG), "overrides": [*self.overrides(seed), f"run.dir={scratch}"],
            "steps": None if full else self.slow_steps, "output": str(made), "block": self.blocks[0],
            "blocks": self.blocks[1],
        }  # fmt: skip
        watched = self._watched(common.worker_command("peers.worker", given, ranks), name, seed, ranks)
        found = json.loads(made.read_text())
        remove(made)
        remove(scratch)
        return found, watched

    def _run(self, name: str, seed: int, ranks: int, *more: str) -> tuple[Path, watch.Watched]:
        """Run the launcher in a new folder: an interrupted run would resume, and not be timed in full."""
        run = self.output / "runs" / f"{name}-{seed}"
        remove(run)
        argv = command("--config", common.CONFIG, *self.overrides(seed), f"run.dir={run}", *more, ranks=ranks)
        return run, self._watched(argv, name, seed, ranks)

    def _job(self, name: str, seed: int, full: bool) -> tuple[dict[str, Any], watch.Watched]:
        """Run all stages; an export without a manifest was not verified."""
        run, watched = self._run(name, seed, 0, "export.formats=[safetensors]", *FEW_TIMINGS)
        markers = sorted((run / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime)
        found = {"stages": {path.stem: json.loads(path.read_text())["seconds"] for path in markers}}
        json.loads((run / "export" / "manifest.json").read_text())
        shutil.rmtree(run)
        return found, watched

    def _ours(self, name: str, seed: int, full: bool) -> tuple[dict[str, Any], watch.Watched]:
        ranks = CONTESTANTS[name].ranks
        run, watched = self._run(name, seed, ranks, "--stages", "data,teacher,cache,init,distill")
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
