"""The composition root: the stages of a run in order, each resumable.

    data -> teacher -> cache -> init -> distill -> evaluate -> export -> report

How a stage is found done, changed or interrupted stands in `stages.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pkd_dist import __version__
from pkd_dist.config.deepspeed import load_deepspeed
from pkd_dist.config.schema import Config
from pkd_dist.data import class_mapping, submission, tasks, text, tokens
from pkd_dist.data.class_weights import class_weights
from pkd_dist.data.prepare import DISTILL, prepare
from pkd_dist.data.tokens import TokenSet
from pkd_dist.distillation import cache
from pkd_dist.distillation.cache import CacheReader, Fingerprint
from pkd_dist.distillation.cache_builder import LiveTeacher, build, resolve_teacher_precision
from pkd_dist.distillation.objective import DistillationLoss, TeacherOutputs, cached_outputs, live_outputs
from pkd_dist.distributed.world import World
from pkd_dist.errors import DivergedError, Preempted, UserError
from pkd_dist.evaluation import predictions as answers
from pkd_dist.evaluation.compare import compare_models
from pkd_dist.evaluation.results import Results, closing_table
from pkd_dist.export import build as build_export
from pkd_dist.export import card, hf, manifest
from pkd_dist.files import changed_file, digest_of, file_digests, is_full, remove, sha256, write_atomically, write_json
from pkd_dist.lock import Lock
from pkd_dist.model import compatibility as fit
from pkd_dist.model import encoder, layers, student
from pkd_dist.model.vocabulary import used_vocabulary
from pkd_dist.stages.base import Markers, Stage, absent
from pkd_dist.telemetry import Telemetry, records, trackers
from pkd_dist.telemetry.endpoint import Access, load_access
from pkd_dist.telemetry.log import log, to_file
from pkd_dist.telemetry.metrics import RunMetrics
from pkd_dist.telemetry.publish import published
from pkd_dist.training import checkpoint
from pkd_dist.training.engine import load_in_background, resolve_precision
from pkd_dist.training.finetune import finetune
from pkd_dist.training.trainer import Job, Trainer

STAGES = ("data", "teacher", "cache", "init", "distill", "evaluate", "export", "report")


class Pipeline:
    """A run: its configuration, its folder, and its stages.

    Args:
        config: as loaded.
        config_file: for messages.
        world: the ranks.

    Raises:
        UserError: whatever can be known to be wrong before anything is written.
    """

    def __init__(self, config: Config, config_file: str | Path | None, world: World):
        self.config, self.world = config, world
        self.dir = Path(config.run.dir)
        self.markers = Markers(self.dir)
        self.deepspeed = load_deepspeed(config, config_file)
        self.task = tasks.resolve(config.task)
        self.base = encoder.locate(config.teacher.model)
        self.base_config = encoder.load_config(self.base)
        self.outputs: dict[str, dict[str, Any]] = {}
        self._lock: Lock | None = None
        trackers.require(config.trackers)
        self._preflight()

    def _preflight(self) -> None:
        config = self.config
        for split in ("train", "dev"):
            text.require(config.task.data, split, self.task)
        text.unlabeled_paths(config.task.unlabeled, self.task)
        length = config.task.max_length
        fit.require_compatible(self.base_config, self._tokenizer, length, config.teacher.model, "teacher.model")
        if config.teacher.finetune is None:
            if not encoder.is_fine_tuned(self.base):
                raise UserError(
                    f"teacher.model: {config.teacher.model} is not fine-tuned (it has no sequence classifier); give "
                    "teacher.finetune to fine-tune it here, or a fine-tuned folder"
                )
            class_mapping.require_outputs(self.task, self.base_config, config.teacher.model, "teacher.model")
            self.task = class_mapping.with_positive_class(self.task, self.class_order())
        self.access = load_access(config.metrics) if config.metrics.enabled and self.world.node_main else Access()
        self.student_depth = student.planned_depth(config.student, self.base_config, self._tokenizer, length)
        depth = encoder.num_layers(self.base_config)
        self.pairs = self._paired(depth, self.student_depth)
        self.rounded = (
            config.distill.patience == "skip" and bool(self.pairs) and layers.skip_is_rounded(depth, self.student_depth)
        )
        self.kept_layers = self._kept(depth)
        self.cached = config.cache.enabled and (config.distill.alpha > 0 or bool(self.pairs))
        _, self.precision = resolve_precision(self.deepspeed, self.world.device)
        self.teacher_precision = resolve_teacher_precision(config.cache.precision, self.world.device)

    def _paired(self, depth: int, student_depth: int) -> tuple[tuple[int, int], ...]:
        """(student layer, teacher layer) of the patience term, from 1 (0: the embeddings); none where it has no weight."""
        distill = self.config.distill
        if not distill.beta:
            return ()
        pairs = enumerate(layers.paired_layers(distill.patience, depth, student_depth), start=1)
        return ((0, 0), *pairs) if distill.pair_embeddings else tuple(pairs)

    def _kept(self, depth: int) -> tuple[int, ...]:
        """The teacher layers whose states a cache that is built now holds."""
        needed = {theirs for _, theirs in self.pairs}
        given = self.config.cache.layers
        kept = needed if given is None else set(range(depth + 1)) if given == "all" else set(given)
        if needed - kept:
            raise UserError(
                f"cache.layers: {given} lacks teacher layer {min(needed - kept)}, which is paired; add it, or give all"
            )
        if max(kept, default=0) > depth:
            raise UserError(f"cache.layers: {max(kept)} is out of range; the teacher has {depth} layers")
        return tuple(sorted(kept))

    # ------------------------------------------------------------------------------------------------ the run itself

    def run(self, stages: Sequence[str] = STAGES, fresh: bool = False) -> None:
        """Runs the stages that are not done; collective.

        Args:
            fresh: start over; an existing run folder gets another name first.

        Raises:
            UserError, DivergedError, Preempted, LostRank: see `errors.py`.
        """
        self._open_folder(fresh)
        try:
            self._run(stages)
        finally:
            if self._lock:
                self._lock.release()

    def _run(self, stages: Sequence[str]) -> None:
        if self.world.device.type == "cuda" and {"teacher", "distill"} & set(stages):
            load_in_background()
        with contextlib.ExitStack() as stack:
            node = self._node()
            metrics = self._metrics(node)
            also = trackers.Trackers(self.dir, self.config.trackers, self.config.model_dump(mode="json"))
            self.telemetry = Telemetry(metrics, self.world.main, also)
            publication = self.world.together(
                lambda: stack.enter_context(published(metrics, self.config.metrics, self.access, self.dir, node))
            )
            self._load_speed_settings()
            try:
                for stage in self.stages():
                    self._run_stage(stage, stage.name in stages)
                    if publication:
                        publication.push()
                    if stage.name == stages[-1]:
                        break
            except Preempted:
                metrics.preemptions.inc()
                raise
            except DivergedError:
                metrics.nonfinite.inc()
                raise

    def _node(self) -> int | None:
        """On the first rank of each node: which of the nodes it is; collective."""
        firsts = [rank for rank, first in enumerate(self.world.gather(self.world.node_main)) if first]
        return firsts.index(self.world.rank) if self.world.node_main else None

    def _metrics(self, node: int | None) -> RunMetrics:
        publishes = node is not None and self.config.metrics.enabled
        metrics = RunMetrics(self.dir / "counters" / f"node-{node}.json" if publishes else None)
        metrics.info.labels(
            __version__, str(self.dir.absolute()), self.task.name, str(self.world.size), self.precision,
            os.environ.get("SLURM_JOB_ID", ""),
        ).set(1)  # fmt: skip
        for name in STAGES:
            metrics.stage.labels(stage=name).set(0)
        if self.world.device.type == "cuda":
            metrics.watch_gpu(self.world.device)
        return metrics

    def _load_speed_settings(self) -> None:
        torch.set_float32_matmul_precision("highest")  # float32 means float32, on a GPU too
        log.info(
            "%d rank(s) started by %s on %s; training in %s, the teacher in %s",
            self.world.size, self.world.launcher, self.world.device.type, self.precision, self.teacher_precision,
        )  # fmt: skip

    def _open_folder(self, fresh: bool) -> None:
        def open_it() -> None:
            try:
                if fresh and self.dir.exists():
                    Lock(self.dir).acquire(tick=self.world.beat).release()  # not under a job that uses it
                    log.info("--fresh: the earlier run is kept in %s", move_aside(self.dir))
                self.dir.mkdir(parents=True, exist_ok=True)
                self._lock = Lock(self.dir).acquire(tick=self.world.beat)
                self._sweep()
                (self.dir / "stages").mkdir(exist_ok=True)
            except OSError as error:
                if is_full(error):
                    raise
                raise UserError(
                    f"run.dir: {self.dir} is not writable ({error.strerror}); choose another run.dir"
                ) from None
            for key, given in (
                ("evaluate.result_dir", self.config.evaluate.result_dir),
                ("cache.dir", self.config.cache.dir),
            ):
                folder = Path(given or self.dir)
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise UserError(f"{key}: {folder} cannot be made ({error.strerror}); choose another") from None
            resolved = self.config.model_dump(mode="json")
            resolved["resolved"] = self._environment()
            dump = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
            write_atomically(self.dir / "config.yaml", lambda tmp: tmp.write_text(dump, encoding="utf-8"))

        self.world.on_main(open_it)
        to_file(self.dir / "logs", self.world.rank)

    def _sweep(self) -> None:
        """Removes what a killed job left half-written, in the places where a run writes; nobody else does now."""
        made = {path for stage in self.stages() for path in (*stage.made, *stage.leftovers)} | {
            self.dir / "config.yaml"
        }
        leftovers = [other for path in made for other in path.parent.glob(f".{path.name}.*tmp")]
        folders = {path for path in made if path.is_dir()} | {
            self.dir / "stages",
            *(self.dir / "data").glob("*"),
        }
        for leftover in (*leftovers, *(other for folder in folders for other in folder.glob(".*.tmp"))):
            remove(leftover)

    def _environment(self) -> dict[str, Any]:
        """What the run was resolved to, beside the settings themselves."""
        names = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy")
        width = int(self.base_config.hidden_size)
        beta, pairs = self.config.distill.beta, len(self.pairs)
        scale = max(1, pairs * width)
        as_mean = self.config.distill.pt_reduction == "mean"
        return {
            "versions": {"pkd_dist": __version__, "python": platform.python_version()} | {n: version(n) for n in names},
            "git_revision": _git_revision(),
            "world_size": self.world.size,
            "launcher": self.world.launcher,
            "device": self.world.device.type,
            "precision": self.precision,
            "teacher_precision": self.teacher_precision,
            "deepspeed": self.deepspeed,
            "teacher_layers": encoder.num_layers(self.base_config),
            "student_layers": self.student_depth,
            "patience_pairs": [list(pair) for pair in self.pairs],
            "beta_mean": beta if as_mean else beta * scale,
            "beta_sum": beta / scale if as_mean else beta,
        }

    def _run_stage(self, stage: Stage, selected: bool) -> None:
        self.world.at(stage.name, loop=False)
        self.world.stop_here(f"before the stage {stage.name}")
        state, why = self.world.on_main(lambda: self.markers.state(stage))
        if state == "done":
            self.outputs[stage.name] = self.world.on_main(lambda: self.markers.outputs(stage))
            self.world.together(lambda: self._show_done(stage.name))
            if selected:
                log.info("%s: done", stage.name)
            return
        if not selected:
            raise UserError(f"the stage {stage.name} is needed first, but {why}; add it to --stages")
        if stage.name in ("evaluate", "export"):
            self.world.on_main(lambda: self._require_weights(why))
        words = {"new": "runs", "started": "goes on"}.get(state, f"runs again, because {why}")
        log.info("%s: %s", stage.name, words)
        inputs = self.world.on_main(stage.inputs)

        self.world.on_main(lambda: self.markers.begin(stage, state, inputs))
        self.inputs = inputs
        runs = self.telemetry.metrics.stage.labels(stage=stage.name)
        runs.set(1)
        began = time.monotonic()
        try:
            outputs = self.world.broadcast(stage.run())
        except Preempted:
            if self.world.main:
                with contextlib.suppress(UserError):  # a full disk: its count is not worth another end
                    self.markers.stop(stage, time.monotonic() - began)
            raise
        finally:
            runs.set(0)
        self.outputs[stage.name] = outputs
        seconds = time.monotonic() - began
        self.world.on_main(lambda: self.markers.end(stage, inputs, outputs, seconds))
        log.info("%s: done in %.1f s", stage.name, seconds)

    def _require_weights(self, why: str) -> None:
        best = self._dirs["checkpoints"] / self.outputs["distill"]["best_file"]
        if not best.exists():
            raise UserError(
                f"{best} is gone (export.prune), so nothing can be made of it again, though {why}; {self._dirs['export']} stays "
                "as it is; give the settings it was made with, or another run.dir"
            )

    def plan(self) -> list[str]:
        """One line a stage: done, or why it would run. Reads, never writes."""
        out, behind = [], None
        for stage in self.stages():
            if behind:
                out.append(f"{stage.name}: may run, after {behind}")
                continue
            state, why = self.markers.state(stage)
            if state == "done":
                self.outputs[stage.name] = self.markers.outputs(stage)
                out.append(f"{stage.name}: done")
            else:
                behind = stage.name
                out.append(f"{stage.name}: runs, because {why}")
        return out

    # ---------------------------------------------------------------------------------------------------- the stages

    def stages(self) -> list[Stage]:
        run, d = self.dir, self._dirs
        teacher_made = (
            (
                run / "teacher",
                run / "teacher_checkpoints",
                run / "teacher_metrics.jsonl",
                *trackers.folders(run, "teacher_"),
            )
            if self.config.teacher.finetune
            else ()
        )
        return [
            Stage("data", self._data_inputs, self._data, (d["data"],), self._data_missing),
            Stage(
                "teacher",
                self._teacher_inputs,
                self._teacher,
                teacher_made,
                self._teacher_missing,
                (run / "teacher_checkpoints",),
            ),
            Stage("cache", self._cache_inputs, self._cache, (run / "cache",), self._cache_missing, completes=True),
            Stage("init", self._init_inputs, self._init, (d["init"],), self._init_missing),
            Stage(
                "distill",
                self._distill_inputs,
                self._distill,
                (d["checkpoints"], run / "metrics.jsonl", *trackers.folders(run)),
                self._distill_missing,
            ),
            Stage(
                "evaluate",
                self._evaluate_inputs,
                self._evaluate,
                (self._result_file, d["predictions"], self._answers_file),
                lambda out: absent(self._result_file) or absent(self._answers_file),
            ),
            Stage(
                "export",
                self._export_inputs,
                self._export,
                (d["export"],),
                self._export_missing,
                (d["checkpoints"],) if self.config.export.prune else (),
            ),
            Stage(
                "report",
                self._report_inputs,
                self._report,
                (run / "report.html",),
                lambda out: absent(run / "report.html"),
            ),
        ]

    @property
    def _dirs(self) -> dict[str, Path]:
        names = ("data", "checkpoints", "predictions", "export")
        return {"init": self.dir / "student_init", **{name: self.dir / name for name in names}}

    @property
    def _result_file(self) -> Path:
        return Path(self.config.evaluate.result_dir or self.dir) / "results_eval.json"

    @property
    def _answers_file(self) -> Path:
        return self.dir / answers.FILE

    # data

    def _data_inputs(self) -> dict[str, Any]:
        task = self.config.task
        settings = task.model_dump(mode="json", exclude={"data", "metric", "class_weights"})
        return {
            **text.digests(task.data, text.available(task.data, self.task), self.task),
            **{f"the text of {path}": sha256(path) for path in text.unlabeled_paths(task.unlabeled, self.task)},
            **{f"task.{key}": value for key, value in settings.items()},
            "tokenizer": encoder.tokenizer_digest(self.base),
        }

    def _data(self) -> dict[str, Any]:
        def write() -> dict[str, Any]:
            task, folder = self.config.task, self._dirs["data"]
            splits, made = prepare(
                task, self.task, self.class_order(), self._tokenizer, folder,
                lambda: self.world.interrupt("data"),
            )  # fmt: skip
            train = splits["train"]
            if self.config.teacher.finetune is None:
                class_mapping.require_outputs_for_split(
                    self.task, self.base_config, train, self.config.teacher.model, "teacher.model"
                )
            names = self.task.names_of(train.classes)
            if self.config.teacher.finetune is None and self.class_order() is None and names:
                log.info(
                    "data: the teacher's outputs have no names; they are taken for %s, in this order", ", ".join(names)
                )
            class_weights(task.class_weights, train.labels_N, train.classes, names)  # refused here, if it cannot be
            if len(train) < self.world.size:
                raise UserError(
                    f"{train.source}: {len(train)} examples for {self.world.size} ranks; use at most as many ranks as examples"
                )
            write_json(folder / "sample.json", {"texts": [column[:8] for column in splits["dev"].texts]})
            return {"classes": list(train.classes), "class_names": names, "sets": list(made), **made}

        return self.world.on_main(write)

    def class_order(self) -> tuple[str, ...] | None:
        """Label values in the order of a given teacher's outputs, where its class names say so."""
        if self.config.teacher.finetune is not None or self.task.regression:
            return self.task.classes
        return class_mapping.class_order(self.task, self.base_config, "teacher.model")

    def _data_missing(self, outputs: dict[str, Any]) -> str | None:
        folders = [self._dirs["data"] / name for name in outputs["sets"]]
        return next((problem for folder in folders if (problem := tokens.problem(folder))), None)

    def _tokens(self, split: str) -> TokenSet:
        return tokens.open_tokens(self._dirs["data"] / split)

    @property
    def _taught(self) -> str:
        """The token set that the student learns from: where the teacher has no weight, text without labels has no say."""
        return DISTILL if DISTILL in self.outputs["data"] and (self.config.distill.alpha or self.pairs) else "train"

    def _class_weights(self) -> torch.Tensor | None:
        """Collective."""
        setting, data = self.config.task.class_weights, self.outputs["data"]
        labels_N = np.asarray(self._tokens("train").labels_N)
        weights_C = self.world.on_main(lambda: class_weights(setting, labels_N, data["classes"], data["class_names"]))
        return None if weights_C is None else torch.from_numpy(weights_C).to(self.world.device)

    @property
    def _labels(self) -> dict[str, Any]:
        """Fields of a model configuration that describe the classes."""
        if self.task.regression:
            return {"num_labels": 1, "problem_type": "regression"}
        names = self.outputs["data"]["class_names"]
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }

    def _used_vocabulary(self, *sets: str) -> np.ndarray:
        """Token ids that occur in these token sets."""
        arrays = [self._tokens(name).input_ids_T for name in sets]
        return used_vocabulary(arrays, int(self.base_config.vocab_size), self._tokenizer.pad_token_id)

    @cached_property
    def _tokenizer(self) -> Any:
        return encoder.load_tokenizer(self.base)

    # teacher

    @property
    def _teacher_folder(self) -> str:
        return str(self.dir / "teacher") if self.config.teacher.finetune else self.base

    @cached_property
    def _base_digest(self) -> str:
        return encoder.weights_digest(self.base)

    def _checkpoint_fingerprint(self) -> str:
        """Of what a checkpoint may be loaded into: the stage's inputs. World size and ZeRO stage may differ."""
        return digest_of(self.inputs)

    def _optimizer_inputs(self) -> dict[str, Any]:
        train, weights = self.config.train, self.config.task.class_weights
        return {
            "run.seed": self.config.run.seed,
            "train.max_grad_norm": train.max_grad_norm,
            "train.adam_epsilon": train.adam_epsilon,
            "precision": self.precision,
            **({"task.class_weights": weights} if weights else {}),
        }

    def _teacher_inputs(self) -> dict[str, Any]:
        out: dict[str, Any] = {"teacher.model": self._base_digest, "classes": self.outputs["data"]["class_names"]}
        if self.config.teacher.finetune:
            out |= {f"teacher.finetune.{k}": v for k, v in self.config.teacher.finetune.model_dump().items()}
            out |= self._optimizer_inputs() | {"task.metric": self.task.metric}
            out |= {f"the {split} data": self.outputs["data"][split]["digest"] for split in ("train", "dev")}
        return out

    def _teacher(self) -> dict[str, Any]:
        if self.config.teacher.finetune is None:
            self.world.on_main(lambda: encoder.load_model(self.base) and None)  # refused here, if it cannot be loaded
            return {"weights": self._base_digest, "folder": self.base}
        folder = self.dir / "teacher"
        best: dict[str, Any] = {}
        if not self.world.on_main(folder.exists):
            progress = finetune(
                self.config, self.base, self._tokenizer, self._labels, self.task, self._tokens("train"), self._tokens("dev"),
                self._class_weights(), self._used_vocabulary("train", "dev"), self.deepspeed, folder, self._checkpoint_fingerprint(),
                self.world, self.telemetry,
            )  # fmt: skip
            best = {"best_epoch": progress.best_epoch, "history": progress.history}

        def finish() -> dict[str, Any]:
            last = checkpoint.committed(self.dir / "teacher_checkpoints")
            history = checkpoint.read_state(last[-1]) if last else {}
            remembered = {"best_epoch": history.get("best_epoch"), "history": history.get("history", [])}
            return {"weights": encoder.weights_digest(str(folder)), "folder": str(folder), **remembered, **best}

        return self.world.on_main(finish)

    def _teacher_missing(self, outputs: dict[str, Any]) -> str | None:
        if self.config.teacher.finetune is None:
            return None
        gone = absent(self.dir / "teacher")
        if not gone and encoder.weights_digest(str(self.dir / "teacher")) != outputs["weights"]:
            raise UserError(
                f"{self.dir / 'teacher'}: this is not the teacher that this run made and cached; put that one back, or use --fresh"
            )
        return gone

    # cache

    @property
    def _cache_folder(self) -> Path:
        return Path(self.config.cache.dir) if self.config.cache.dir else self.dir / "cache"

    def _fingerprint(self) -> Fingerprint:
        """Of the answers that this run needs."""
        return Fingerprint(
            teacher=self.outputs["teacher"]["weights"],
            tokenizer=encoder.tokenizer_digest(self.base),
            tokens=self.outputs["data"][self._taught]["input_digest"],
            max_length=self.config.task.max_length,
            layers=tuple(theirs for _, theirs in self.pairs),
            dtype=self.config.cache.dtype,
            precision=self.teacher_precision,
            states=self.config.distill.states,
        )

    def _live_teacher(self, layers: Sequence[int]) -> LiveTeacher:
        model = encoder.load_model(self._teacher_folder)
        return LiveTeacher(
            model,
            layers,
            self.teacher_precision,
            self.config.cache.dtype,
            self.config.distill.states == "tokens",
            self.world.device,
        )

    def _cache_inputs(self) -> dict[str, Any]:
        if not self.cached:
            return {"cached": False}
        return {"cache.dir": self.config.cache.dir, **self._kept_fingerprint().as_json()}

    def _kept_fingerprint(self) -> Fingerprint:
        return replace(self._fingerprint(), layers=self.kept_layers)

    def _cache(self) -> dict[str, Any]:
        if not self.cached:
            off = "cache.enabled is false: the teacher runs in every step"
            log.info("cache: not built (%s)", off if not self.config.cache.enabled else "alpha and beta are 0")
            return {"rows": 0, "built": 0}
        with self._sole_builder():
            built = build(
                self._cache_folder, self._kept_fingerprint(), self._tokens(self._taught), self._live_teacher,
                self._tokenizer.pad_token_id, self.config.cache.shard_rows, self.world, self.telemetry,
            )  # fmt: skip

        def size() -> int:
            return sum(p.stat().st_size for p in self._cache_folder.glob("*.*s*"))

        return {
            "rows": self.outputs["data"][self._taught]["examples"],
            "built": built,
            "bytes": self.world.on_main(size),
        }

    @contextlib.contextmanager
    def _sole_builder(self) -> Iterator[None]:
        """Of several runs that share a cache one builds it; the others wait, and find it done."""
        locks: list[Lock] = []

        def lock() -> None:
            self._cache_folder.mkdir(parents=True, exist_ok=True)
            locks.append(Lock(self._cache_folder).acquire(wait=True, tick=lambda: self.world.interrupt("cache")))
            for leftover in self._cache_folder.glob(".*.tmp"):
                remove(leftover)

        if self.config.cache.dir:
            self.world.on_main(lock)
        try:
            yield
        finally:
            for held in locks:
                held.release()

    def _cache_missing(self, outputs: dict[str, Any]) -> str | None:
        """A shard that is gone is built again; one that is damaged, or another teacher's cache, is refused."""
        if not self.cached:
            return None
        manifest = cache.read_manifest(self._cache_folder)
        if manifest is None:
            return f"{self._cache_folder / cache.MANIFEST} is missing"
        cache.require_fingerprint(self._cache_folder, manifest, self._kept_fingerprint())
        gone = []
        for entry in manifest["shards"]:
            if not (self._cache_folder / entry["file"]).exists():
                gone.append(entry["file"])
            elif problem := cache.shard_problem(self._cache_folder, entry):
                raise UserError(f"{problem}; remove the file to have this shard built again")
        return f"{', '.join(gone)} is missing" if gone else None

    # init

    def _init_inputs(self) -> dict[str, Any]:
        settings = self.config.student.model_dump(exclude={"dropout"})
        out = {f"student.{key}": value for key, value in settings.items()}
        out |= {
            "teacher": self.outputs["teacher"]["weights"],
            "classes": self.outputs["data"]["class_names"],
            "run.seed": self.config.run.seed,
        }
        if self.config.student.init == "first_k":
            out["teacher.model"] = self._base_digest
        elif self.config.student.init not in ("teacher_layers", "random"):
            out["student.init weights"] = encoder.weights_digest(
                encoder.locate(self.config.student.init, "student.init")
            )
        return out

    def _init(self) -> dict[str, Any]:
        def create() -> dict[str, Any]:
            model, what = student.create(
                self.config.student, self._teacher_folder, self.base, self._labels, self.config.run.seed
            )
            folder = self._dirs["init"]
            temporary = folder.with_name(f".{folder.name}.tmp")
            remove(temporary)
            encoder.save_model(model, self._tokenizer, temporary)
            remove(folder)
            os.replace(temporary, folder)
            log.info("init: a %d-layer student from %s", encoder.num_layers(model.config), what)
            if self.rounded:
                log.info("init: %d does not divide by %d, so the patience pairs are rounded to %s",
                         encoder.num_layers(self.base_config), self.student_depth, list(self.pairs))  # fmt: skip
            return {
                "made_of": what,
                "weights": encoder.weights_digest(str(folder)),
                "parameters": encoder.parameter_count(model),
                "files": file_digests(folder),
            }

        return self.world.on_main(create)

    def _init_missing(self, outputs: dict[str, Any]) -> str | None:
        folder = self._dirs["init"]
        return changed_file(folder, outputs["files"])

    # distill

    def _distill_inputs(self) -> dict[str, Any]:
        config = self.config
        train = config.train.model_dump(
            include={"epochs", "batch_size", "learning_rate", "weight_decay", "warmup_ratio"}
        )
        return {
            **{f"distill.{k}": v for k, v in config.distill.model_dump().items()},
            **{f"train.{k}": v for k, v in train.items()},
            **self._optimizer_inputs(),
            "task.metric": self.task.metric,
            "student.dropout": config.student.dropout,
            "evaluate.every_epochs": config.evaluate.every_epochs,
            "cache.enabled": config.cache.enabled,
            "the student's starting weights": self.outputs["init"]["weights"],
            "the teacher's answers": self._fingerprint().digest,
            "the training data": self.outputs["data"][self._taught]["digest"],
            "the dev data": self.outputs["data"]["dev"]["digest"],
        }

    def _distill(self) -> dict[str, Any]:
        config = self.config
        answers: TeacherOutputs | None = None
        if self.cached:
            manifest = self.world.on_main(lambda: cache.read_manifest(self._cache_folder))
            shards = range(self.world.rank, len(manifest["shards"]) if manifest else 0, self.world.size)
            reader = self.world.together(lambda: CacheReader(self._cache_folder, self._fingerprint(), shards))
            answers = cached_outputs(reader)
        elif config.distill.alpha or self.pairs:
            answers = live_outputs(self._live_teacher(self._fingerprint().layers))
        module = student.open_student(
            self._dirs["init"],
            config.student.dropout,
            config.distill.projection if self.pairs else "never",
            int(self.base_config.hidden_size),
            config.run.seed,
            self._used_vocabulary(self._taught, "dev"),
            config.distill.states == "tokens",
        )
        job = Job(
            name="distill",
            module=module,
            losses=DistillationLoss(config.distill, tuple(mine for mine, _ in self.pairs), self._class_weights()),
            teacher_outputs=answers,
            train=self._tokens(self._taught),
            dev=self._tokens("dev"),
            task=self.task,
            pad_id=self._tokenizer.pad_token_id,
            seed=config.run.seed,
            epochs=config.train.epochs,
            batch_size=config.train.batch_size,
            micro_batch_size=config.train.micro_batch_size,
            learning_rate=config.train.learning_rate,
            weight_decay=config.train.weight_decay,
            warmup_ratio=config.train.warmup_ratio,
            max_grad_norm=config.train.max_grad_norm,
            adam_epsilon=config.train.adam_epsilon,
            eval_batch_size=config.evaluate.batch_size,
            eval_every_epochs=config.evaluate.every_epochs,
            log_every_steps=config.train.log_every_steps,
            checkpoint=config.checkpoint,
            deepspeed=self.deepspeed,
            folder=self._dirs["checkpoints"],
            records=self.dir / "metrics.jsonl",
            fingerprint=self._checkpoint_fingerprint(),
        )
        progress = Trainer(job, self.world, self.telemetry).run()
        if self.cached:
            self._require_cache_unaltered(shards)
        assert progress.best_file is not None
        return {
            "best_file": progress.best_file,
            "best_epoch": progress.best_epoch,
            "best_metric": progress.best_metric,
            "history": progress.history,
            "weights": progress.best_sha256,
            "steps": progress.step,
            "samples": progress.samples,
            "tokens": progress.tokens,
        }

    def _require_cache_unaltered(self, shards: Sequence[int]) -> None:
        """The answers were read through a memory map all the time: what came of others does not count."""
        self.world.at("distill, the cache's checksums", loop=False)
        try:
            self.world.together(lambda: CacheReader(self._cache_folder, self._fingerprint(), shards))
        except UserError as problem:
            stage = next(stage for stage in self.stages() if stage.name == "distill")
            why = f"the cache was altered while it was trained on ({str(problem).partition(';')[0]})"
            self.world.on_main(lambda: self.markers.spoil(stage, why))
            raise

    def _distill_missing(self, outputs: dict[str, Any]) -> str | None:
        best = self._dirs["checkpoints"] / outputs["best_file"]
        if self.config.export.prune and (self.dir / "stages" / "export.json").exists() and not best.exists():
            return None  # pruned by the export, which is verified
        gone = absent(best)
        return gone or (f"{best} was altered" if sha256(best) != outputs["weights"] else None)

    # evaluate

    def _best_student(self) -> Any:
        made = self.outputs["distill"]
        return hf.best_student(self._dirs["init"], self._dirs["checkpoints"] / made["best_file"], made["weights"])

    def _evaluate_inputs(self) -> dict[str, Any]:
        return {
            "the student": self.outputs["distill"]["weights"],
            "the teacher": self.outputs["teacher"]["weights"],
            **{f"the {split} data": self.outputs["data"][split]["digest"] for split in self._scored},
            "task.metric": self.task.metric,
            "evaluate.result_dir": self.config.evaluate.result_dir,
        }

    @property
    def _scored(self) -> list[str]:
        return [name for name in self.outputs["data"]["sets"] if name not in ("train", DISTILL)]

    def _evaluate(self) -> dict[str, Any]:
        models = {"teacher": encoder.load_model(self._teacher_folder), "student": self._best_student()}
        splits = {split: self._tokens(split) for split in self._scored}
        made = compare_models(models, splits, self.task, self.config.evaluate, self._tokenizer.pad_token_id, self.world)
        results, timings, logits = made.results, made.timings, made.logits

        def write() -> None:
            self._result_file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._result_file, results)
            answers.write(self._answers_file, splits, logits)
            for split in (name for name in splits if name not in ("dev", *results["splits"])):
                for name, logits_NC in logits[split].items():
                    folder = self._dirs["predictions"] / name
                    folder.mkdir(parents=True, exist_ok=True)
                    path = submission.write(folder, split, self.task, logits_NC, self.outputs["data"]["classes"])
                    log.info("evaluate: %s has no labels; the %s's answers: %s", split, name, path)

        self.world.on_main(write)
        self._show_results(results)
        return {
            "results": results,
            "latencies_ms": {name: timing.latencies_ms_R.round(4).tolist() for name, timing in timings.items()},
            "rates": {name: timing.rates for name, timing in timings.items()},
        }

    def _show_done(self, stage: str) -> None:
        """Sets the gauges to where an earlier process, which has done the stage, left them."""
        metrics, of = self.telemetry.metrics, {"teacher": "teacher_", "distill": ""}
        if stage == "evaluate":
            self._show_results(self.outputs[stage]["results"])
        elif stage in of and self.world.node_main:
            metrics.eval_metric.clear()  # of another training
            metrics.show_past(records.read(self.dir / f"{of[stage]}metrics.jsonl"))
            if commits := checkpoint.committed(self.dir / f"{of[stage]}checkpoints"):
                metrics.checkpoint_time.set((commits[-1] / checkpoint.COMMIT).stat().st_mtime)

    def _show_results(self, results: Results) -> None:
        """The finished student's figures: what trained before has no say any more."""
        metrics = self.telemetry.metrics
        metrics.eval_metric.clear()
        metrics.show_evaluation("dev", results["student"])
        for split, part in results["splits"].items():
            metrics.show_evaluation(split, part["student"])

    # export

    def _export_inputs(self) -> dict[str, Any]:
        return {"the student": self.outputs["distill"]["weights"], "results": digest_of(self.outputs["evaluate"]["results"]),
                "export.formats": self.config.export.formats}  # fmt: skip

    def _export(self) -> dict[str, Any]:
        def write() -> dict[str, Any]:
            folder = self._dirs["export"]
            subject = build_export.Subject(
                student=self._best_student(),
                tokenizer=self._tokenizer,
                task=self.task,
                labels=self.outputs["data"]["class_names"],
                dev=self._tokens("dev"),
                train=self._tokens("train"),
                texts=tuple(json.loads((self._dirs["data"] / "sample.json").read_text())["texts"]),
                max_length=self.config.task.max_length,
                evaluate=self.config.evaluate,
            )
            about = {"task": self.task.name, "main_metric": self.task.main_metric, "pkd_dist": __version__}
            made = build_export.export(
                subject, self.config.export.formats, folder,
                lambda figures: card.render(self._card_facts(), figures),
                about, lambda: self.world.interrupt("export"),
            )  # fmt: skip
            log.info("export: %s: %s; every file answers dev as it should", folder, ", ".join(made["files_on_dev"]))
            if self.config.export.prune:
                log.info("export: verified; its checkpoints are removed (export.prune)")
            return {
                "weights": made["files"]["model.safetensors"],
                "largest_difference": made["files_on_dev"]["model.safetensors"]["largest_difference"],
                "files": made["files"] | {manifest.MANIFEST: sha256(folder / manifest.MANIFEST)},
            }

        return self.world.on_main(write)

    def _card_facts(self) -> card.CardFacts:
        environment, out = self._environment(), self.outputs
        return card.CardFacts(
            config=self.config,
            results=out["evaluate"]["results"],
            main_metric=self.task.main_metric,
            class_names=out["data"]["class_names"],
            train_source=out["data"]["train"]["source"],
            train_examples=out["data"]["train"]["examples"],
            dev_source=out["data"]["dev"]["source"],
            best_epoch=out["distill"]["best_epoch"],
            student_source=out["init"]["made_of"],
            student_layers=environment["student_layers"],
            patience_pairs=environment["patience_pairs"],
            beta_mean=environment["beta_mean"],
            beta_sum=environment["beta_sum"],
            precision=environment["precision"],
            device=environment["device"],
            world_size=environment["world_size"],
            versions=environment["versions"],
        )

    def _export_missing(self, outputs: dict[str, Any]) -> str | None:
        return changed_file(self._dirs["export"], outputs["files"])

    # report

    def _report_inputs(self) -> dict[str, Any]:
        return {"results": digest_of(self.outputs["evaluate"]["results"]), "export": self.outputs["export"]["weights"]}

    def _report(self) -> dict[str, Any]:
        from pkd_dist.report import pages

        return self.world.on_main(lambda: pages.write(self.dir))

    def summary(self) -> str:
        """The table a run ends with: teacher beside student, and where to find the export and the report."""
        return closing_table(self.outputs["evaluate"]["results"], self._dirs["export"], self.dir / "report.html")


def _git_revision() -> str | None:
    """The revision of this code: of the checkout, or as a snapshot for a cluster says."""
    root = Path(__file__).parents[1]
    if (root / "REVISION").is_file():
        return (root / "REVISION").read_text().strip()
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=False
        )  # fmt: skip
    except OSError:
        return None
    return out.stdout.strip() or None


def move_aside(folder: Path) -> Path | None:
    """`--fresh`: gives an existing run folder a new name, so that the run starts over under the old one."""
    folder = folder.resolve()
    if not folder.exists():
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    os.replace(folder, target)
    return target
