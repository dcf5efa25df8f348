"""The stage `data`: reads and tokenizes every split, and the extra text that the teacher labels, into RUN/data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pkd_dist.config.task import FileSplit
from pkd_dist.data import answers, class_mapping, sources, text, tokens, trimming
from pkd_dist.data.class_weights import class_weights
from pkd_dist.data.examples import Split, is_labelled
from pkd_dist.data.prepare import DISTILL, TokenSetSummary, prepare, write_tokens
from pkd_dist.data.target_scale import TargetScale
from pkd_dist.data.tasks import Task
from pkd_dist.data.tokens import TokenSet
from pkd_dist.errors import UserError
from pkd_dist.files import changed_file, digest_of, make_folder, sha256, write_json
from pkd_dist.model import digests, encoder, student, vocabulary
from pkd_dist.model.head import MULTIPLE_CHOICE, SEQUENCE_CLASSIFICATION
from pkd_dist.model.word_embeddings import read_word_embeddings
from pkd_dist.stages.base import Artifacts, Inputs, Stage
from pkd_dist.stages.context import Context, Resolved
from pkd_dist.telemetry.log import log

SAMPLE, SAMPLE_TEXTS = "sample.json", 8
"""A few texts of dev, with which the export proves its tokenizer."""

STUDENT = "student"
"""Folder of all token sets in the student's tokens, where it reads others than its teacher."""

TRIMMED = "trimmed"
"""Folder of the finished student's tokenizer, where `student.vocabulary` cuts it, and of the scored splits in its tokens."""


@dataclass(frozen=True)
class KeptVocabulary:
    """The tokens that the finished student knows, of its tokenizer's `total`; the digest is that of their ids."""

    kept: int
    total: int
    digest: str


@dataclass(frozen=True)
class DataOutput:
    """The token sets of this run, and the task's classes.

    Attributes:
        classes: label values in the order of the logits; empty for a regression. Of multiple choice, what labels call the options.
        class_names: their names, in the same order.
        scale: of a regression's training targets; None: targets are learned as they are.
        vocabulary: None: the finished student knows all tokens that it was trained with.
        sets: token set -> what is in it: the splits, and `distill` where there is extra text.
        student_sets: the same in the student's tokens; None: it reads as its teacher does.
        answers: digest of the teacher's answers, in RUN/data, where it is a file of answers.
    """

    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    sets: dict[str, TokenSetSummary]
    scale: TargetScale | None = None
    vocabulary: KeptVocabulary | None = None
    student_sets: dict[str, TokenSetSummary] | None = None
    answers: str | None = None

    @property
    def for_student(self) -> dict[str, TokenSetSummary]:
        """The token sets as the student reads them."""
        return self.student_sets or self.sets

    @property
    def scored(self) -> list[str]:
        """The splits that both models are evaluated on."""
        return [name for name in self.sets if name not in ("train", DISTILL)]

    def model_fields(self, task: Task) -> dict[str, Any]:
        """Return the fields of a model configuration that describe the outputs and the head, whatever the model had before."""
        if task.multiple_choice:
            return {"num_labels": 1, "architectures": [MULTIPLE_CHOICE]}
        head = {"architectures": [SEQUENCE_CLASSIFICATION]}
        if task.regression:
            return {"num_labels": 1, "problem_type": "regression"} | head
        kind = "multi_label" if task.multilabel else "single_label"
        fields = {
            "num_labels": len(self.class_names),
            "id2label": dict(enumerate(self.class_names)),
            "label2id": {name: i for i, name in enumerate(self.class_names)},
            "problem_type": f"{kind}_classification",
        } | head
        # A model that this one starts from may be an export, with thresholds of its own.
        return fields | ({"thresholds_in_bias": None} if task.multilabel else {})


VERSION = 1


def inputs(context: Context) -> Inputs:
    run, task = context.resolved, context.resolved.config.task
    files = sources.digests(task.data, sources.available(task.data, run.task), run.task)
    settings = task.model_dump(mode="json", exclude={"data", "split", "metric", "class_weights", "positive"})
    if task.class_names:
        settings["class_names"] = [list(pair) for pair in task.class_names.items()]  # their order counts
    found: Inputs = {"task.targets": "standardized"} if run.task.regression else {}
    if sources.is_file(task.data):
        found |= {f"task.split.{key}": value for key, value in (task.split or FileSplit()).model_dump().items()}
    if task.augment:
        settings["augment"] = task.augment.model_dump(
            exclude={"neighbours", "min_confidence"}
        )  # as earlier versions have it
        found["task.augment.neighbours"] = task.augment.neighbours
        if task.augment.neighbours:
            found["teacher.model.weights"] = digests.weights_digest(run.source)
    return found | {
        **{f"task.data:{file}": digest for file, digest in files.items()},
        **{f"task.unlabeled:{path}": sha256(path) for path in sources.unlabeled_paths(task.unlabeled, run.task)},
        **{f"task.{key}": value for key, value in settings.items()},
        "teacher.tokenizer": digests.tokenizer_digest(run.source),
        **{f"student.{key}": getattr(run.config.student, key) for key in ("vocabulary", "min_count", "max_length")},
        **_own_tokenizer(context),
        **_answer_files(context),
    }


def _answer_files(context: Context) -> Inputs:
    """Return the files of the teacher's answers as inputs, if there are any."""
    teacher = context.resolved.config.teacher
    if not teacher.answers:
        return {}
    files = {f"teacher.answers:{path}": sha256(path) for path in answers.paths_of(teacher.answers)}
    return {**files, "teacher.answers_are": teacher.answers_are}


def _own_tokenizer(context: Context) -> Inputs:
    """Return the student's tokenizer as an input, unless it is the teacher's."""
    run = context.resolved
    if run.student_tokenizer is run.tokenizer:
        return {}
    return {"student.tokenizer": digests.tokenizer_digest(encoder.locate(run.config.student.init, "student.init"))}


def require_usable(context: Context, is_done: Callable[[], bool]) -> None:
    """Read data whose splits this run makes itself, unless the stage is done: what cannot be split ends here.

    Called before anything is written.

    Raises:
        UserError: as the stage.
    """
    task = context.resolved.config.task
    if (sources.is_file(task.data) or task.duplicates != "keep") and not is_done():
        splits = text.read_all(
            task.data, context.resolved.task, context.resolved.class_order, lambda: context.world.interrupt("data")
        )
        _require_trainable(context, splits)


def run(context: Context) -> DataOutput:
    return context.world.on_main(lambda: _prepare(context))


def _prepare(context: Context) -> DataOutput:
    run, folder = context.resolved, context.resolved.paths.data
    task = run.config.task
    splits, summaries = prepare(
        task, run.task, run.class_order, run.tokenizer, folder, lambda: context.world.interrupt("data"),
        lambda: read_word_embeddings(run.source),
    )  # fmt: skip
    if run.has_answers:
        for name in [
            name for name, split in splits.items() if name.startswith("test") and not is_labelled(split.labels_N).all()
        ]:
            log.info(
                "data: %s has no labels and is left out: only a teacher's model could answer it",
                splits.pop(name).source,
            )
            del summaries[name]
    train = splits["train"]
    names = run.task.names_of(train.classes)
    _require_trainable(context, splits)
    if not (run.finetunes or run.has_answers) and run.class_order is None and names and run.task.has_named_classes:
        log.warning(
            "data: the outputs of %s have no names; they are taken to be %s, in this order; task.class_names sets another",
            " and ".join(run.config.teacher.models), ", ".join(names),
        )  # fmt: skip
    for teacher in run.teachers:
        if not (run.finetunes or run.has_answers) and getattr(teacher.source_config, "thresholds_in_bias", None):
            log.warning(
                "data: teacher.model: the biases of %s contain thresholds (thresholds_in_bias in its config.json), so its scores are "
                "not probabilities, and the student learns them as they are; the teacher of its run has none", teacher.model,
            )  # fmt: skip
    write_json(folder / SAMPLE, {"texts": splits["dev"].inputs(slice(SAMPLE_TEXTS))})
    answered = _answers(context, splits, names) if run.has_answers else None
    own = None if run.reads_alike else _write_student_tokens(context, splits)
    kept = _trim(context, splits) if run.config.student.vocabulary == "used" else None
    if run.task.regression:
        labelled = train if is_labelled(train.labels_N).any() else splits["dev"]
        scale = TargetScale.of(np.asarray(labelled.labels_N))
        log.info(
            "data: targets are learned as (target - %.6g) / %.6g; every model predicts in their own unit",
            scale.mean,
            scale.std,
        )
        return DataOutput((), (), summaries, scale, kept, own, answered)
    output = DataOutput(
        tuple(train.classes), tuple(names), summaries, vocabulary=kept, student_sets=own, answers=answered
    )
    if run.task.multiple_choice:
        log.info("data: %d options, which labels call %s", len(names), ", ".join(names))
    else:
        log.info("data: %s", _classes(run, output).sentence())
    return output


def _answers(context: Context, splits: dict[str, Split], names: Sequence[str]) -> str:
    """Write the teacher's answers to all splits, in their order, and return their digest."""
    run, path = context.resolved, context.resolved.paths.data / answers.FILE
    teacher = run.config.teacher
    found, notes = answers.read(teacher.answers or (), teacher.answers_are, run.task, splits, names)
    answers.write(path, found)
    log.info(
        "data: the teacher's answers to %s are from %s (%s); they hold no hidden states, so there is no patience term",
        ", ".join(f"{len(logits):,} {name}" for name, logits in found.items()), ", ".join(teacher.names),
        teacher.answers_are.replace("_", "-"),
    )  # fmt: skip
    for note in notes:
        log.info("data: %s", note)
    return sha256(path)


def _write_student_tokens(context: Context, splits: dict[str, Split]) -> dict[str, TokenSetSummary]:
    run = context.resolved
    log.info(
        "data: the student reads its own tokens, of %s at most %d in a text (the teacher: of %s at most %d)",
        f"{len(run.student_tokenizer):,}", run.student_length, f"{len(run.tokenizer):,}", run.config.task.max_length,
    )  # fmt: skip
    return write_tokens(
        splits, run.student_tokenizer, run.student_length, run.paths.data / STUDENT,
        lambda: context.world.interrupt("data"), run.tokenizer.mask_token,
    )  # fmt: skip


def _require_trainable(context: Context, splits: dict[str, Split]) -> None:
    """Raise UserError if the teacher, the class weights or the number of ranks do not fit the data."""
    run, train = context.resolved, splits["train"]
    if not (run.finetunes or run.has_answers):
        for teacher in run.teachers:
            class_mapping.require_outputs_for_split(
                run.task, teacher.source_config, train, teacher.model, "teacher.model"
            )
    class_weights(run.config.task.class_weights, train.labels_N, train.classes, run.task.names_of(train.classes))
    if len(train) < context.world.size:
        raise UserError(
            f"{train.source}: {len(train)} examples for {context.world.size} ranks; use at most as many ranks as examples"
        )


def _trim(context: Context, splits: dict[str, Split]) -> KeptVocabulary:
    """Cut the tokenizer to the tokens of the training text, and write the scored splits in its tokens."""
    run, folder, read = context.resolved, context.resolved.paths.data, _student_folder(context)
    name = DISTILL if DISTILL in splits else "train"
    plain = tokens.open_tokens(read / name)
    plain_T = plain.input_ids_T[: plain.offsets_N1[(len(plain) - splits[name].augmented) * plain.options]]
    shape = student.planned_config(run.config.student, run.source_config)
    counts_V = trimming.count_tokens([plain_T], int(shape.vocab_size))
    min_count = run.config.student.min_count
    kept_K = trimming.kept_ids(run.student_tokenizer, counts_V, min_count, vocabulary.required_ids(shape))
    make_folder(folder / TRIMMED)
    tokenizer = trimming.trim(run.student_tokenizer, kept_K, folder / TRIMMED)
    for scored in [each for each in splits if each not in ("train", DISTILL)]:
        made = tokens.tokenize(
            splits[scored], tokenizer, run.student_length, folder / TRIMMED / scored,
            lambda: context.world.interrupt("data"),
        )  # fmt: skip
        trimming.require_exact(tokens.open_tokens(read / scored), made, kept_K, run.student_tokenizer.unk_token_id)
    kept = KeptVocabulary(len(kept_K), len(run.student_tokenizer), digest_of(kept_K.tolist()))
    log.info(
        "data: the finished student keeps %s of %s tokens, and %.1f of %.1f MB (float32)",
        f"{kept.kept:,}", f"{kept.total:,}", *(4e-6 * count for count in encoder.planned_sizes(shape, kept.kept)[::-1]),
    )  # fmt: skip
    return kept


def missing(context: Context, output: DataOutput) -> str | None:
    folders = [context.resolved.paths.data / name for name in output.sets]
    folders += [context.resolved.paths.data / STUDENT / name for name in output.student_sets or ()]
    folders += [context.resolved.paths.data / TRIMMED / name for name in output.scored if output.vocabulary]
    if output.answers and (altered := changed_file(context.resolved.paths.data, {answers.FILE: output.answers})):
        return altered
    return next((problem for folder in folders if (problem := tokens.problem(folder))), None)


def artifacts(context: Context) -> Artifacts:
    return Artifacts((context.resolved.paths.data,))


STAGE = Stage("data", VERSION, DataOutput, inputs, run, missing, artifacts)


# ------------------------------------------------------------------------------------------- for the stages after it


def classes_of(context: Context) -> class_mapping.ClassMapping | None:
    """Return how the teacher's outputs, label values and names correspond; None where outputs are no classes with names."""
    output = context.output(DataOutput)
    return _classes(context.resolved, output) if output.classes and context.resolved.task.has_named_classes else None


def _classes(run: Resolved, output: DataOutput) -> class_mapping.ClassMapping:
    outputs = None if run.finetunes or run.has_answers else class_mapping.output_names(run.source_config)
    return class_mapping.match(run.task, output.classes, output.sets["train"].per_class, outputs)


def scored_task(context: Context) -> Task:
    """Return the task with its positive class, which may depend on the data."""
    task, classes = context.resolved.task, classes_of(context)
    return class_mapping.with_positive(task, classes) if classes else task


def positive_input(context: Context) -> Inputs:
    """Return the positive class as an input of a stage that scores, unless it is the task's usual one."""
    classes, usual = classes_of(context), context.resolved.task.positive_class
    if classes is None or classes.positive is None:
        return {}
    value = classes.values[classes.positive]
    return {} if value == (usual or classes.values[1]) else {"task.positive": value}


def scale_input(context: Context) -> Inputs:
    """Return the scale of a regression's targets as an input of a stage that trains or runs a model."""
    scale = context.output(DataOutput).scale
    return {"data.scale": [scale.mean, scale.std]} if scale else {}


def with_learned_targets(context: Context, found: TokenSet) -> TokenSet:
    """Return a token set to train on: targets of a regression are standardized."""
    scale = context.output(DataOutput).scale
    return scale.standardized(found) if scale else found


def open_answers(context: Context) -> dict[str, np.ndarray]:
    """Open the teacher's answers: token set -> logits (N, C) float32; those to a regression are in its own unit."""
    return answers.load(context.resolved.paths.data / answers.FILE)


def open_tokens(context: Context, name: str) -> TokenSet:
    """Open one of the token sets, in the teacher's tokens."""
    return tokens.open_tokens(context.resolved.paths.data / name)


def open_student_tokens(context: Context, name: str) -> TokenSet:
    """Open one of the token sets, as the student reads it in training."""
    return tokens.open_tokens(_student_folder(context) / name)


def _student_folder(context: Context) -> Path:
    data = context.resolved.paths.data
    return data if context.resolved.reads_alike else data / STUDENT


@dataclass(frozen=True)
class StudentTexts:
    """How the finished student reads text.

    Attributes:
        kept_K: ids that its tokens had in training; None: they are the same.
        splits: scored split -> examples in its tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    kept_K: np.ndarray | None
    splits: dict[str, TokenSet]


def student_texts(context: Context) -> StudentTexts:
    """Open the scored splits as the finished student reads them."""
    run, output = context.resolved, context.output(DataOutput)
    if output.vocabulary is None:
        read = {split: open_student_tokens(context, split) for split in output.scored}
        return StudentTexts(run.student_tokenizer, None, read)
    folder = run.paths.data / TRIMMED
    splits = {split: tokens.open_tokens(folder / split) for split in output.scored}
    return StudentTexts(encoder.load_tokenizer(str(folder), "student.vocabulary"), trimming.read_kept(folder), splits)


def student_reading_input(context: Context) -> Inputs:
    """Return what the finished student reads as inputs of a stage that runs it, unless it reads as its teacher does."""
    data = context.output(DataOutput)
    found: Inputs = {"data.vocabulary": data.vocabulary.digest} if data.vocabulary else {}
    own = data.student_sets or {}
    return found | {f"data.{split}.student": own[split].digest for split in data.scored if own}


def training_set(context: Context) -> str:
    """Return the token set that the student learns from: extra text counts only where the teacher labels it."""
    extra = DISTILL in context.output(DataOutput).sets and context.resolved.needs_teacher
    return DISTILL if extra else "train"


def open_class_weights(context: Context) -> torch.Tensor | None:
    """Return the weight of each class in the cross-entropy, (C,) on the device; None: all alike. Collective."""
    setting, data = context.resolved.config.task.class_weights, context.output(DataOutput)
    labels_N = np.asarray(open_tokens(context, "train").labels_N)
    weights_C = context.world.on_main(lambda: class_weights(setting, labels_N, data.classes, data.class_names))
    return None if weights_C is None else torch.from_numpy(weights_C).to(context.world.device)


def teacher_vocabulary(context: Context) -> np.ndarray:
    """Return the token ids that occur while a teacher is fine-tuned, ascending."""
    run = context.resolved
    arrays = [open_tokens(context, name).input_ids_T for name in ("train", "dev")]
    return vocabulary.used_vocabulary(arrays, int(run.source_config.vocab_size), run.tokenizer.pad_token_id)


def student_vocabulary(context: Context) -> np.ndarray:
    """Return the token ids that occur while the student is trained, ascending."""
    run = context.resolved
    arrays = [open_student_tokens(context, name).input_ids_T for name in (training_set(context), "dev")]
    shape = student.planned_config(run.config.student, run.source_config)
    return vocabulary.used_vocabulary(arrays, int(shape.vocab_size), run.student_tokenizer.pad_token_id)
