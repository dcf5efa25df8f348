"""Build an export: the Hugging Face folder, the files to serve it from, and the proof that each of them works.

student -> safetensors, ONNX (float32 -> float16, int8), torch.export, Triton -> verify every file on all of dev
        -> time -> set beside the teacher -> model card -> manifest -> rename to the final name
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkd_dist.config.schema import Evaluate
from pkd_dist.data.tasks import Task
from pkd_dist.data.tokens import TokenSet
from pkd_dist.errors import UserError
from pkd_dist.evaluation.calibration import reliability
from pkd_dist.evaluation.compare import Side, size_figures
from pkd_dist.evaluation.deployment import ANSWERS_TITLE, TEACHER, TEACHER_TITLE, Deployment, Measured, beside_teacher
from pkd_dist.evaluation.metrics import agreement, score
from pkd_dist.evaluation.predictions import Predictions
from pkd_dist.evaluation.results import Speed
from pkd_dist.evaluation.scoring import Inputs, forward_of, predict_logits_single
from pkd_dist.evaluation.speed import TimedInputs, machine, measure_speed, timing_threads
from pkd_dist.export import hf, independence, int8, manifest, onnx, triton
from pkd_dist.export.manifest import ExportFigures, ExportManifest, FileFigures
from pkd_dist.export.runtime import ONNX_FILES, TITLES, TORCH_FILE, WEIGHTS_FILE, OnnxModel, to_deploy
from pkd_dist.files import folder_written_atomically, require_space, write_atomically
from pkd_dist.metric_names import MAIN_METRIC
from pkd_dist.model.encoder import accepted, parameter_count, save_model
from pkd_dist.telemetry.log import log

TOLERANCE = 1e-4
"""Largest difference allowed between a logit of a float32 file and PyTorch's; see `hf.tolerance`."""
LOSS_ALLOWED = 0.005
"""Loss of the main metric allowed for a file of lower precision; one example where dev has fewer than 200."""
LOSS_ALLOWED_OF_SETS, EXAMPLES_OF_SETS = 0.02, 4
"""The same, and the number of examples where dev is small, if a text can have several classes: each is several decisions, and
thresholds are where dev's F1 is best, so that any rounding moves it down."""
_TRITON_NAMES = {"onnx": "student", "onnx-fp16": "student_fp16", "onnx-int8": "student_int8"}

Runnable = Callable[[Inputs], torch.Tensor | np.ndarray]
"""A tokenizer's outputs -> logits_BC on the CPU."""
Verdict = dict[str, float]
"""What was found of a file on dev; see `FileFigures`."""


@dataclass(frozen=True)
class Reference:
    """The teacher that the files are set beside, and what was answered before the export.

    Attributes:
        teacher: In float32, on the CPU, and dev in its tokens.
        test: The labeled test split in the student's tokens; None: there is none, and the files are compared on dev alone.
        answers: Split -> what teacher and student answered, in the order of the token set.
    """

    teacher: Side | None
    test: TokenSet | None
    answers: Mapping[str, Predictions]


@dataclass(frozen=True)
class Subject:
    """The student to export, and the data that its files are verified on.

    Attributes:
        student: In float32, on the CPU.
        labels: Class names in the order of the logits; empty for a regression.
        dev: Every file is run on all of it.
        texts: The first texts of dev, by column.
        max_length: Tokens at which inputs are truncated.
        evaluate: Batch size, and the number of single sentences timed for each file.
        reference: None: the files are set beside no teacher.
        kept: Tokens of the teacher that the student knows, (kept, total); None: all.
        temperature: That the student's last layer was divided by; None: it is not calibrated.
        thresholds: Class name -> threshold that the bias of its last layer contains; None: a text has one class.
    """

    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    labels: list[str]
    dev: TokenSet
    texts: tuple[list[str], ...]
    max_length: int
    evaluate: Evaluate
    reference: Reference | None = None
    kept: tuple[int, int] | None = None
    temperature: float | None = None
    thresholds: dict[str, float] | None = None

    @property
    def pad_id(self) -> int:
        return cast(int, self.tokenizer.pad_token_id)

    @property
    def pair(self) -> bool:
        return len(self.task.text) > 1


@dataclass(frozen=True)
class Judged:
    """A file that was run on dev; `logits_NC` is (N, C) float32."""

    forward: Runnable
    logits_NC: np.ndarray
    verdict: Verdict


class _Verifier:
    """Runs files on all of dev and compares them with PyTorch in float32.

    Attributes:
        logits_NC: PyTorch's, (N, C) float32.
        main_metric: PyTorch's.
    """

    def __init__(self, subject: Subject, check: Callable[[], None]):
        self._subject, self._check = subject, check
        self.logits_NC = self.run(forward_of(subject.student), subject.dev)
        self.main_metric = self._main_metric(self.logits_NC)

    @torch.inference_mode()
    def run(self, forward: Runnable, tokens: TokenSet) -> np.ndarray:
        """Return the logits of a file, (N, C) float32."""
        subject = self._subject
        return predict_logits_single(self._checked(forward), tokens, subject.evaluate.batch_size, subject.pad_id)

    def _checked(self, forward: Runnable) -> Runnable:
        def checked(inputs: Inputs) -> torch.Tensor | np.ndarray:
            self._check()
            return forward(inputs)

        return checked

    @torch.inference_mode()
    def batch_effect(self, forward: Runnable) -> independence.BatchEffect:
        return independence.measure(self._checked(forward), self._subject.dev, self._subject.pad_id)

    def _main_metric(self, logits_NC: np.ndarray) -> float:
        return score(logits_NC, np.asarray(self._subject.dev.labels_N), self._subject.task)[MAIN_METRIC]

    def ece(self, logits_NC: np.ndarray) -> Verdict:
        """Return the calibration error of a file on dev; nothing where the student is not calibrated."""
        if self._subject.temperature is None:
            return {}
        return {"ece": reliability(logits_NC, np.asarray(self._subject.dev.labels_N))["ece"]}

    def judge(self, forward: Runnable) -> Judged:
        logits_NC = self.run(forward, self._subject.dev)
        verdict: Verdict = {
            "largest_difference": float(np.abs(logits_NC - self.logits_NC).max()),
            "agreement": agreement(logits_NC, self.logits_NC, self._subject.task.multilabel),
            "main_metric": self._main_metric(logits_NC),
            **cast(Verdict, self.batch_effect(forward)),
            **self.ece(logits_NC),
        }
        return Judged(forward, logits_NC, verdict)

    def require_good(self, name: str, verdict: Verdict, exact: bool) -> None:
        """Raise UserError where a file is too far from the student: in its logits if `exact`, else in its metric."""
        metric, lost = self._subject.task.main_metric, self.main_metric - verdict["main_metric"]
        remedy = f"the export is not written; leave its format out of export.formats ({name})"
        tolerance = hf.tolerance(TOLERANCE, self.logits_NC)
        if exact and not verdict["largest_difference"] <= tolerance:
            raise UserError(
                f"export: {name}: logits differ from PyTorch's by {verdict['largest_difference']:.2g} on dev, more than "
                f"{tolerance:.0e}; {remedy}"
            )
        least, examples = LOSS_ALLOWED, 1
        if self._subject.task.multilabel:
            least, examples = LOSS_ALLOWED_OF_SETS, EXAMPLES_OF_SETS
        allowed = max(least, examples / len(self._subject.dev))
        if not exact and not lost <= allowed + 1e-9:
            raise UserError(
                f"export: {name}: {metric} on dev is {100 * lost:.2f} points below PyTorch's {100 * self.main_metric:.2f}, "
                f"more than {100 * allowed:.2f}; {remedy}"
            )
        largest, mean = verdict["batch_effect"], verdict["batch_effect_mean"]
        if not independence.holds(verdict, exact):
            allowed_effect = f"{independence.TOLERANCE:g}"
            if not exact:
                allowed_effect = f"{independence.RARE:g}, or {allowed_effect} on average"
            raise UserError(
                f"export: {name}: other texts in a batch move an answer on dev by {largest:.2g} ({mean:.2g} on average), more than "
                f"{allowed_effect}; {remedy}"
            )
        log.info("export: %s: largest difference of a logit %.1e, effect of other texts in a batch at most %.1e (mean %.1e), %s %.4f",
                 name, verdict["largest_difference"], largest, mean, metric, verdict["main_metric"])  # fmt: skip


def _merit(verdict: Verdict) -> tuple[bool, float, float]:
    """Order verdicts: answers that other texts do not change first, then by agreement with the student."""
    return independence.holds(verdict, exact=False), verdict["agreement"], -verdict["largest_difference"]


class _Builder:
    """Writes and verifies the files of an export in a folder that holds the Hugging Face files already.

    Attributes:
        found: File name -> figures so far.
        judged: File name -> the run on dev that they come from.
    """

    def __init__(self, subject: Subject, folder: Path, check: Callable[[], None]):
        self.subject, self.folder, self.check = subject, folder, check
        self.verifier = _Verifier(subject, check)
        self.found: dict[str, FileFigures] = {}
        self.judged: dict[str, Judged] = {}

    def build(self, formats: Sequence[str]) -> None:
        """Write and verify all files but the model card and the manifest.

        Raises:
            UserError: A format cannot be written, or its file is too far from the student.
        """
        (self.folder / "onnx").mkdir()
        source = self.folder / ONNX_FILES["onnx"]
        if any(name.startswith("onnx") for name in formats):
            self._onnx(source, half="onnx-fp16" in formats)
        if "onnx-int8" in formats:
            self._int8(source)
        if "torch-export" in formats:
            self._program()
        if "triton" in formats:
            self._triton(formats)
        if "onnx" not in formats:  # the others were made from it
            source.unlink(missing_ok=True)
            self.found.pop(ONNX_FILES["onnx"], None)
            self.judged.pop(ONNX_FILES["onnx"], None)
        if not any((self.folder / "onnx").iterdir()):
            (self.folder / "onnx").rmdir()

    def _accept(self, name: str, judged: Judged, exact: bool) -> None:
        self.verifier.require_good(name, judged.verdict, exact)
        self.found[name] = cast(FileFigures, {**judged.verdict, "bytes": (self.folder / name).stat().st_size})
        self.judged[name] = judged

    def _onnx(self, source: Path, half: bool) -> None:
        onnx.write(self.subject.student, self.subject.tokenizer, source)
        if half:
            name = ONNX_FILES["onnx-fp16"]
            onnx.write_half(source, self.folder / name)
            self._accept(name, self.verifier.judge(OnnxModel(self.folder / name)), exact=False)
        onnx.split_norms(source)
        self._accept(ONNX_FILES["onnx"], self.verifier.judge(OnnxModel(source)), exact=True)

    def _int8(self, source: Path) -> None:
        """Keep the int8 file that agrees best with float32 on dev, among those of all ways to quantize."""
        name = ONNX_FILES["onnx-int8"]
        tried: dict[str, Judged] = {}
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            files = {how: Path(scratch) / f"{number}.onnx" for number, how in enumerate(int8.QUANTIZATIONS)}
            for how, path in files.items():
                self.check()
                onnx.write_int8(source, path, how)
                tried[how] = self.verifier.judge(OnnxModel(path))
            best = max(tried, key=lambda how: _merit(tried[how].verdict))
            os.replace(files[best], self.folder / name)
        self._accept(name, tried[best], exact=False)
        self.found[name]["quantisation"] = best
        self.found[name]["tried"] = {how: judged.verdict for how, judged in tried.items()}

    def _program(self) -> None:
        path = self.folder / TORCH_FILE
        path.parent.mkdir()
        onnx.write_program(self.subject.student, self.subject.tokenizer, path)
        program = torch.export.load(path).module()

        def forward(inputs: Inputs) -> torch.Tensor:
            logits_BC: torch.Tensor = program(**accepted(self.subject.student, inputs))
            return logits_BC

        self._accept(TORCH_FILE, self.verifier.judge(forward), exact=True)

    def _triton(self, formats: Sequence[str]) -> None:
        subject = self.subject
        graphs = {_TRITON_NAMES[name]: self.folder / file for name, file in ONNX_FILES.items() if name in formats}
        inputs = list(accepted(subject.student, dict.fromkeys(subject.tokenizer.model_input_names)))
        triton.write(self.folder / "triton", graphs, inputs, subject.labels, subject.pair, subject.max_length)

    def measure(self) -> dict[str, Speed]:
        """Return file name -> speed, PyTorch's under `WEIGHTS_FILE` and the teacher's under `TEACHER`, all in turn.

        They run on one core unless OMP_NUM_THREADS is set, so that thread pools do not compete.
        """
        subject, reference = self.subject, self.subject.reference
        settings = subject.evaluate.model_copy(update={"throughput_samples": -(-subject.evaluate.latency_samples // 2)})
        cpu = torch.device("cpu")
        inputs = TimedInputs.choose(subject.dev, subject.pad_id, cpu, settings)
        models: dict[str, PreTrainedModel] = {}
        own_inputs: dict[str, TimedInputs] = {}
        if reference is not None and reference.teacher is not None:
            models[TEACHER], dev = reference.teacher.model, reference.teacher.splits["dev"]
            own_inputs[TEACHER] = TimedInputs.choose(
                dev, reference.teacher.pad_id, cpu, settings, ordered_as=subject.dev
            )
        with timing_threads(1) as threads, torch.inference_mode():
            forwards: dict[str, Runnable] = {
                **{name: forward_of(model) for name, model in {**models, WEIGHTS_FILE: subject.student}.items()},
                **{
                    name: OnnxModel(self.folder / name, threads)
                    if isinstance(judged.forward, OnnxModel)
                    else judged.forward
                    for name, judged in self.judged.items()
                },
            }
            timings = measure_speed(forwards, inputs, check=self.check, own_inputs=own_inputs)
        return {name: timing.figures for name, timing in timings.items()}

    def beside(self, reference: Reference, files: Mapping[str, FileFigures], speeds: Mapping[str, Speed]) -> Deployment:
        """Set the files beside the teacher, on dev and on test where it has labels."""
        subject, answers = self.subject, reference.answers
        splits = ["dev", *(["test"] if reference.test is not None else [])]
        parameters = parameter_count(subject.student)
        logits_NC = np.concatenate([answers[split].logits[TEACHER] for split in splits])
        models = [Measured(TEACHER, ANSWERS_TITLE, None, None, logits_NC, None)]
        if reference.teacher is not None:
            size = size_figures(reference.teacher.model)
            models = [
                Measured(
                    TEACHER,
                    TEACHER_TITLE,
                    size["parameters"],
                    round(size["modelSize"] * 1e6),
                    logits_NC,
                    speeds[TEACHER],
                )
            ]
        for name in (name for name in TITLES if name in files):
            logits_NC = self._answers(name, reference)
            models.append(Measured(name, TITLES[name], parameters, files[name]["bytes"], logits_NC, speeds[name]))
        return beside_teacher(
            subject.task, {split: np.asarray(answers[split].labels_N) for split in splits}, models, to_deploy(files),
            subject.evaluate.batch_size, machine()["processor"],
        )  # fmt: skip

    def _answers(self, name: str, reference: Reference) -> np.ndarray:
        """Return the logits of a file on dev, as it was verified, and on test if there is one."""
        is_student = name == WEIGHTS_FILE
        dev_NC = self.verifier.logits_NC if is_student else self.judged[name].logits_NC
        if reference.test is None:
            return dev_NC
        if is_student and self._as_evaluated(reference):
            return np.concatenate([dev_NC, reference.answers["test"].logits["student"]])
        forward = forward_of(self.subject.student) if is_student else self.judged[name].forward
        return np.concatenate([dev_NC, self.verifier.run(forward, reference.test)])

    def _as_evaluated(self, reference: Reference) -> bool:
        """Tell whether the student answers dev as it did in the evaluation, so that its answers to test are known."""
        before_NC, now_NC = reference.answers["dev"].logits["student"], self.verifier.logits_NC
        return bool(np.abs(before_NC - now_NC).max() <= hf.tolerance(TOLERANCE, now_NC))


def needed_bytes(weights_bytes: int, formats: Sequence[str]) -> int:
    """Return about how much disk an export of these formats takes while it is built."""
    return weights_bytes * len(formats)


def export(
    subject: Subject,
    formats: Sequence[str],
    output: Path,
    render_card: Callable[[ExportFigures], str],
    about: Mapping[str, object],
    check: Callable[[], None] = lambda: None,
) -> ExportManifest:
    """Write an export atomically, after every file was verified on all of dev.

    Args:
        formats: Values of `export.formats`.
        render_card: Figures of the files -> the model card, README.md.
        about: Further entries of the manifest.
        check: Called often; an exception it raises ends the export and leaves nothing behind.

    Returns:
        The manifest.

    Raises:
        UserError: A file is too far from the student, a format cannot be written, or the disk is full.
    """
    with folder_written_atomically(output) as temporary:
        save_model(subject.student, subject.tokenizer, temporary, subject.max_length)
        weights_bytes = (temporary / WEIGHTS_FILE).stat().st_size
        with require_space(output.absolute().parent, needed_bytes(weights_bytes, formats), output.name):
            builder = _Builder(subject, temporary, check)
            verifier = builder.verifier
            difference = hf.verify(temporary, verifier.logits_NC, subject.dev, subject.texts, subject.max_length,
                                   subject.evaluate.batch_size)  # fmt: skip
            builder.build(formats)
        speeds = builder.measure()
        weights = {"largest_difference": difference, "agreement": 1.0, "bytes": weights_bytes,
                   "main_metric": verifier.main_metric,
                   **verifier.batch_effect(forward_of(subject.student)), **verifier.ece(verifier.logits_NC)}  # fmt: skip
        figures: ExportFigures = {
            "formats": list(formats),
            "opset": onnx.OPSET,
            "files_on_dev": {
                name: cast(FileFigures, {**found, **speeds[name]})
                for name, found in {WEIGHTS_FILE: weights, **builder.found}.items()
            },
            "measured_on": {**machine(), "threads": speeds[WEIGHTS_FILE]["threads"]},
        }
        if subject.reference is not None:
            if TEACHER in speeds:
                figures["teacher"] = speeds[TEACHER]
            figures["deployment"] = asdict(builder.beside(subject.reference, figures["files_on_dev"], speeds))
        if subject.kept is not None:
            figures["vocabulary"] = {"kept": subject.kept[0], "total": subject.kept[1]}
        if subject.temperature is not None:
            figures["temperature"] = subject.temperature
        if subject.thresholds is not None:
            figures["thresholds"] = subject.thresholds
        card = render_card(figures)
        write_atomically(temporary / "README.md", lambda tmp: tmp.write_text(card, encoding="utf-8"), len(card))
        made = manifest.write(temporary, {**about, **figures, **manifest.of_task(subject.task, subject.max_length)})
    return made
