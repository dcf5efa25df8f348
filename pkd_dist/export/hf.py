"""A student as a Hugging Face folder, and the proof that plain `transformers` loads it to the same logits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from pkd_dist.data.tokens import TokenSet
from pkd_dist.errors import UserError
from pkd_dist.evaluation.scoring import answers
from pkd_dist.export import manifest
from pkd_dist.files import remove, require_unaltered
from pkd_dist.model.encoder import USED_IDS, accepted, load_model, load_tokenizer, save_model, weights_digest
from pkd_dist.model.vocabulary import full_embedding
from pkd_dist.training import checkpoint

TOLERANCE = 1e-5
"""Largest difference between a logit of the trained and of the reloaded student, in float32."""


def best_student(init: Path, weights: Path, digest: str) -> PreTrainedModel:
    """The trained student as a plain model: the starting folder's shape, the best epoch's weights, no projection.

    Raises:
        UserError: the weights are not those of this digest.
    """
    require_unaltered(weights, digest)
    return _filled(load_model(str(init), "student_init"), load_file(weights))


def _filled(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    state = {k.removeprefix("model."): v for k, v in weights.items() if not k.startswith("projection.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {name for name in model.state_dict() if name not in dict(model.named_parameters(remove_duplicate=True))}
    assert not unexpected and not set(missing) - tied, f"weights do not fit: {missing} {unexpected}"
    return model.eval()


def from_checkpoint(path: Path, output: Path, dtype: str) -> dict[str, Any]:
    """Exports a checkpoint of any world size and ZeRO stage, in one process: the student at that step.

    Args:
        path: RUN/checkpoints/step-N; RUN/student_init gives the shape and the tokenizer.
        output: written whole, or not at all; must not exist.
        dtype: float32 (the master weights), float16 or bfloat16.

    Returns:
        `step`, `epoch` (of the last evaluation), `main_metric` (of that evaluation, None where there was none),
        `parameters`.

    Raises:
        UserError: not a committed, intact checkpoint of a student beside what it was started from, or `output` exists.
    """
    if output.exists():
        raise UserError(f"--output: {output} exists; choose a new folder")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output: no such folder: {output.absolute().parent}")
    if not (path / checkpoint.COMMIT).is_file():
        raise UserError(f"--from-checkpoint: {path} is not a committed checkpoint; expected RUN/checkpoints/step-N")
    problem, _ = checkpoint.damage(path, best=False)
    if problem:
        raise UserError(f"--from-checkpoint: {problem}; choose another checkpoint")
    init = path.absolute().parent.parent / "student_init"
    if not init.is_dir():
        raise UserError(
            f"--from-checkpoint: {init} is missing; keep the checkpoint in its run folder, RUN/checkpoints/step-N"
        )
    marker = init.parent / "stages" / "distill.json"
    started_from = (
        json.loads(marker.read_text())["inputs"].get("the student's starting weights") if marker.exists() else None
    )
    if started_from not in (None, weights_digest(str(init))):
        raise UserError(f"--from-checkpoint: {init} is not what this student was started from; put that folder back")
    shards, state = checkpoint.Shards(path), checkpoint.read_state(path)
    model = load_model(str(init), "student_init")
    weights = {name: shards.tensor(checkpoint.WEIGHT, name) for name in shards.names()}
    if USED_IDS in weights:
        table: torch.Tensor = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
        name = next(f"model.{n}" for n, p in model.named_parameters() if p.data_ptr() == table.data_ptr())
        weights[name] = full_embedding(table, weights.pop(USED_IDS), weights[name], state["decay"])
    _filled(model, weights).to(getattr(torch, dtype))
    tokenizer = load_tokenizer(str(init), "student_init")
    temporary = output.with_name(f".{output.name}.tmp")
    remove(temporary)
    try:
        save_model(model, tokenizer, temporary)
        again = AutoModelForSequenceClassification.from_pretrained(temporary, dtype="auto").state_dict()
        for key, value in model.state_dict().items():
            if again[key].dtype != value.dtype or not torch.equal(again[key], value):
                raise UserError(f"{output}: {key} reads back differently; the export is not usable")
        manifest.write(temporary, {"step": state["progress"]["step"], "dtype": dtype})
        os.replace(temporary, output)
    finally:
        remove(temporary)
    history = state["progress"]["history"]
    return {
        "step": state["progress"]["step"],
        "epoch": history[-1]["epoch"] if history else None,
        "main_metric": history[-1]["main_metric"] if history else None,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


@torch.inference_mode()
def verify(
    folder: Path, logits_NC: np.ndarray, dev: TokenSet, texts: tuple[list[str], ...], max_length: int, batch_size: int
) -> float:
    """Reloads a folder with plain `transformers`, and compares.

    Args:
        logits_NC: the student's on every example of dev, which the reloaded model must give.
        texts: some of dev's texts, in order: the reloaded tokenizer must give dev's tokens.

    Returns:
        The largest difference of a logit.

    Raises:
        UserError: the reloaded model or tokenizer differs.
    """
    reloaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    again = tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"]
    for i, ids in enumerate(again):
        if ids != dev.input_ids_T[dev.offsets_N1[i] : dev.offsets_N1[i + 1]].tolist():
            raise UserError(
                f"{folder}: the reloaded tokenizer gives other tokens for dev example {i}; the export is not usable"
            )

    def forward(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return reloaded(**accepted(reloaded, inputs)).logits

    found_NC = answers(forward, dev, batch_size, tokenizer.pad_token_id)
    difference = float(np.abs(found_NC - logits_NC).max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"{folder}: the reloaded student's logits differ by {difference:.2g}, more than {TOLERANCE:.0e}; the export is "
            "not usable"
        )
    return difference
