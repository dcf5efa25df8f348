"""Writes a student as a Hugging Face folder, and proves that plain `transformers` loads it to the same logits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from pkd_dist.data.batches import collate
from pkd_dist.data.tokens import TokenSet
from pkd_dist.errors import UserError
from pkd_dist.files import remove
from pkd_dist.model.encoder import load_model

TOLERANCE = 1e-5
"""Largest difference between a logit of the trained and of the reloaded student, in float32."""


def best_student(init: Path, weights: Path) -> PreTrainedModel:
    """The trained student as a plain model: the starting folder's shape, the best epoch's weights, no projection."""
    model = load_model(str(init), "student_init")
    state = {k.removeprefix("model."): v for k, v in load_file(weights).items() if not k.startswith("projection.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {name for name in model.state_dict() if name not in dict(model.named_parameters(remove_duplicate=True))}
    assert not unexpected and not set(missing) - tied, f"weights do not fit: {missing} {unexpected}"
    return model.eval()


def export(
    student: PreTrainedModel,
    tokenizer: Any,
    card: str,
    output: Path,
    dev: TokenSet,
    texts: tuple[list[str], ...],
    max_length: int,
) -> float:
    """Writes `output` whole or not at all, after reloading what was written.

    Args:
        student: in float32.
        card: the model card, README.md.
        dev: token set on whose every example the reloaded model must give the student's logits.
        texts: some of dev's texts, in order: the reloaded tokenizer must give dev's tokens.

    Returns:
        The largest difference of a logit.

    Raises:
        UserError: the reloaded model or tokenizer differs; nothing is left behind.
    """
    temporary = output.with_name(f".{output.name}.tmp")
    remove(temporary)
    try:
        student.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        difference = _verify(student, temporary, dev, texts, max_length)
        remove(output)
        os.replace(temporary, output)
    finally:
        remove(temporary)
    return difference


@torch.inference_mode()
def _verify(
    student: PreTrainedModel, folder: Path, dev: TokenSet, texts: tuple[list[str], ...], max_length: int
) -> float:
    reloaded = AutoModelForSequenceClassification.from_pretrained(folder).to(next(student.parameters()).device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    again = tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"]
    for i, ids in enumerate(again):
        if ids != dev.input_ids_T[dev.offsets_N1[i] : dev.offsets_N1[i + 1]].tolist():
            raise UserError(
                f"{folder}: the reloaded tokenizer gives other tokens for dev example {i}; the export is not usable"
            )
    worst = 0.0
    for start in range(0, len(dev), 64):
        rows = np.arange(start, min(start + 64, len(dev)))
        inputs = collate(dev, rows, np.ones(len(rows)), tokenizer.pad_token_id).to(reloaded.device).inputs
        worst = max(worst, float((student(**inputs).logits - reloaded(**inputs).logits).abs().max()))
    if not worst <= TOLERANCE:
        raise UserError(
            f"{folder}: the reloaded student's logits differ by {worst:.2g}, more than {TOLERANCE:.0e}; the export is not usable"
        )
    return worst
