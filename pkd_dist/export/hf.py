"""A student as a Hugging Face folder, and the proof that plain `transformers` loads it to the same logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from pkd_dist.data import trimming
from pkd_dist.data.tokens import TokenSet, encode
from pkd_dist.errors import UserError
from pkd_dist.evaluation.scoring import forward_of, predict_logits_single
from pkd_dist.export import manifest
from pkd_dist.files import folder_written_atomically, require_unaltered
from pkd_dist.model.digests import weights_digest
from pkd_dist.model.encoder import USED_IDS, load_config, load_model, load_tokenizer, save_model
from pkd_dist.model.head import is_multiple_choice, model_class
from pkd_dist.model.regression_head import restore
from pkd_dist.model.vocabulary import full_embedding, trim_embedding
from pkd_dist.training import checkpoint

TOLERANCE = 1e-5
"""Largest difference allowed between a logit of the trained and of the reloaded student, in float32; see `tolerance`."""


def tolerance(base: float, logits_NC: np.ndarray) -> float:
    """Return the difference allowed between logits: `base`, relative to the spread of a regression's predictions.

    A prediction far from 0 also has the rounding of float32, a few units in the last place.

    Args:
        base: For logits of a classification, whose spread is about 1.
        logits_NC: The expected ones; C = 1 for a regression.
    """
    if logits_NC.shape[1] > 1:
        return base
    ulp = float(np.finfo(np.float32).eps * np.abs(logits_NC).max())
    return base * float(logits_NC.std()) + 8 * ulp


def best_student(init: Path, weights: Path, digest: str) -> PreTrainedModel:
    """Return the trained student as a plain model: the starting folder's shape and the best epoch's weights.

    A projection, which only training needs, is left out. A regression predicts in the user's unit.

    Raises:
        UserError: The weights do not have this sha256.
    """
    require_unaltered(weights, digest)
    return restore(_with_weights(load_model(str(init), "student_init"), load_file(weights)))


def _with_weights(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    state = {k.removeprefix("model."): v for k, v in weights.items() if not k.startswith("projection.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {name for name in model.state_dict() if name not in dict(model.named_parameters(remove_duplicate=True))}
    assert not unexpected and not set(missing) - tied, f"weights do not fit: {missing} {unexpected}"
    return model.eval()


@dataclass(frozen=True)
class CheckpointStudent:
    """The student at a checkpoint, as exported.

    Attributes:
        epoch, main_metric: Of the last evaluation before it; None if there was none.
    """

    step: int
    epoch: float | None
    main_metric: float | None
    parameters: int


def from_checkpoint(
    path: Path,
    output: Path,
    dtype: str,
    started_from: str | None,
    trained: manifest.ExportManifest | None = None,
    trimmed: Path | None = None,
) -> CheckpointStudent:
    """Export the student at a checkpoint of any world size and ZeRO stage, in one process.

    Args:
        path: RUN/checkpoints/step-N; RUN/student_init gives the shape and the tokenizer.
        output: Written atomically; must not exist.
        dtype: float32 (the master weights), float16 or bfloat16.
        started_from: `weights_digest` of the student's starting weights as the run recorded it; None: not checked.
        trained: `manifest.of_task` of the run, which the manifest repeats; None: unknown.
        trimmed: Folder of the student's tokenizer where it has fewer tokens than the starting folder's.

    Raises:
        UserError: `path` is not a committed, intact checkpoint next to the folder it was started from, or `output` exists.
    """
    init = _require_checkpoint(path, output)
    if started_from not in (None, weights_digest(str(init))):
        raise UserError(
            f"{init} is not the folder this student was started from; restore that folder", "--from-checkpoint"
        )
    shards, state = checkpoint.Shards(path), checkpoint.read_state(path)
    model = load_model(str(init), "student_init")
    weights = {name: shards.tensor(checkpoint.WEIGHT, name) for name in shards.names()}
    if USED_IDS in weights:
        table: torch.Tensor = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
        name = next(f"model.{n}" for n, p in model.named_parameters() if p.data_ptr() == table.data_ptr())
        weights[name] = full_embedding(table, weights.pop(USED_IDS), weights[name], state["decay"])
    restore(_with_weights(model, weights)).to(getattr(torch, dtype))
    if trimmed is not None:
        trim_embedding(model, trimming.read_kept(trimmed))
    progress = state["progress"]
    _save(model, trimmed or init, output, {**(trained or {}), "step": progress["step"], "dtype": dtype})
    last = progress["history"][-1] if progress["history"] else {}
    return CheckpointStudent(
        step=progress["step"],
        epoch=last.get("epoch"),
        main_metric=last.get("main_metric"),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def _require_checkpoint(path: Path, output: Path) -> Path:
    """Return RUN/student_init of an intact checkpoint, if `output` can be written."""
    if output.exists():
        raise UserError(f"{output} exists; choose a new folder", "--output")
    if not output.absolute().parent.is_dir():
        raise UserError(f"no such folder: {output.absolute().parent}", "--output")
    if not (path / checkpoint.COMMIT).is_file():
        there = ", ".join(each.name for each in checkpoint.committed(path.parent)) if path.parent.is_dir() else ""
        remedy = f"; {path.parent} has {there}" if there else "; expected RUN/checkpoints/step-N"
        raise UserError(f"{path} is not a committed checkpoint{remedy}", "--from-checkpoint")
    problem, _ = checkpoint.damage(path)
    if problem:
        raise UserError(f"{problem}; choose another checkpoint", "--from-checkpoint")
    init = path.absolute().parent.parent / "student_init"
    if not init.is_dir():
        raise UserError(
            f"{init} is missing; keep the checkpoint in its run folder, RUN/checkpoints/step-N", "--from-checkpoint"
        )
    return init


def _save(model: PreTrainedModel, tokenizer: Path, output: Path, about: manifest.ExportManifest) -> None:
    """Write a model with the tokenizer in a folder, after checking that it reloads unchanged."""
    with folder_written_atomically(output) as temporary:
        save_model(model, load_tokenizer(str(tokenizer), "student_init"), temporary, about.get("max_length"))
        reloaded = (
            model_class(model.config).from_pretrained(temporary, dtype="auto", trust_remote_code=False).state_dict()
        )
        for key, value in model.state_dict().items():
            if reloaded[key].dtype != value.dtype or not torch.equal(reloaded[key], value):
                raise UserError(f"{output}: {key} reads back differently; the export is not usable")
        manifest.write(temporary, about)


@torch.inference_mode()
def verify(
    folder: Path, logits_NC: np.ndarray, dev: TokenSet, texts: tuple[list[str], ...], max_length: int, batch_size: int
) -> float:
    """Reload a folder with plain `transformers` and compare its logits on all of dev.

    Args:
        logits_NC: Expected logits.
        texts: The first texts of dev, or pairs of its options, by column; the reloaded tokenizer must turn them into dev's tokens.

    Returns:
        The largest difference of a logit.

    Raises:
        UserError: The reloaded model or tokenizer differs.
    """
    config = load_config(str(folder))
    reloaded = model_class(config).from_pretrained(folder, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if is_multiple_choice(config):
        (read,), _ = encode(tokenizer, texts, 1, max_length, only_first=True)
    else:
        read = tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"]
    for i, ids in enumerate(read):
        if ids != dev.input_ids_T[dev.offsets_N1[i] : dev.offsets_N1[i + 1]].tolist():
            raise UserError(
                f"{folder}: the reloaded tokenizer splits dev example {i} into other tokens; the export is not usable"
            )
    found_NC = predict_logits_single(forward_of(reloaded), dev, batch_size, tokenizer.pad_token_id)
    difference = float(np.abs(found_NC - logits_NC).max())
    allowed = tolerance(TOLERANCE, logits_NC)
    if not difference <= allowed:
        raise UserError(
            f"{folder}: the reloaded student's logits differ by {difference:.2g}, more than {allowed:.0e}; the export "
            "is not usable"
        )
    return difference
