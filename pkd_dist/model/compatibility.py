"""What a model must be to be distilled, and what must hold between it and the tokenizer it is read with."""

from __future__ import annotations

from typing import Any

from transformers.models.auto import modeling_auto

from pkd_dist.errors import UserError
from pkd_dist.model.families import positions_follow_padding

KNOWN_FAMILIES = (
    "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert", "deberta-v2", "modernbert",
)  # fmt: skip
"""`model_type`s that are known to work. Another encoder may: what a model needs is checked, not its name."""
_NOT_BY_TOKEN = ("canine", "funnel", "perceiver")
PROBES = (
    ("A film by José Núñez, isn't it?  Yes: 3.5/5!",),
    ("Über-naïve PLOT; don't\twatch…", "#2 (1999) — 10€, www.example.org 電影 😀"),
)
"""Texts that tell two tokenizers apart: case, accents, spaces, numbers, punctuation, other scripts, a pair."""


def longest_input(config: Any) -> int | None:
    """Tokens that a model has positions for; None where its configuration does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0 or not getattr(config, "position_biased_input", True):
        return None  # DeBERTa without absolute positions: relative ones beyond the last are counted as the last
    return positions - (config.pad_token_id + 1 if positions_follow_padding(config) else 0)


def require_compatible(config: Any, tokenizer: Any, max_length: int, name: str, key: str) -> None:
    """That a model can be distilled, and can read what this tokenizer gives.

    Args:
        config, name: of the model; what the user calls it, under `key`.
        tokenizer: of the run (the teacher's).
        max_length: of the run's inputs, tokens.

    Raises:
        UserError: it is no encoder whose first token stands for the text, or tokenizer, length and model do not fit.
    """
    family = config.model_type
    causal, masked = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    known = f"known to work: {', '.join(KNOWN_FAMILIES)}"
    if family not in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise UserError(f"{key}: {name} is a {family}, of which transformers has no sequence classifier; {known}")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{key}: {name} is a {family}, an encoder with a decoder; an encoder alone is needed; {known}")
    if getattr(config, "is_decoder", False) or (family in causal and family not in masked):
        raise UserError(
            f"{key}: {name} is a {family}, which predicts the next token: its first token does not stand for the text, "
            f"as an encoder's does; {known}"
        )
    if family in _NOT_BY_TOKEN:
        raise UserError(f"{key}: {name} is a {family}, whose layers do not give one state for each token; {known}")
    longest = longest_input(config)
    if longest and max_length > longest:
        raise UserError(f"{max_length} is more than {name} can read; give at most {longest}", "task.max_length")
    if tokenizer.pad_token_id is None:
        raise UserError(f"{key}: the tokenizer of {name} has no padding token; give it one (pad_token)")
    if tokenizer.cls_token_id is None or tokenizer(PROBES[0][0])["input_ids"][0] != tokenizer.cls_token_id:
        raise UserError(
            f"{key}: the tokenizer of {name} does not put its cls_token first, where a classifier reads; {known}"
        )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{key}: {name} embeds {config.vocab_size} tokens, the tokenizer has {len(tokenizer)}; give the model and "
            "the tokenizer that belong together"
        )
    if positions_follow_padding(config) and tokenizer.pad_token_id != config.pad_token_id:
        raise UserError(
            f"{key}: {name} counts positions from its padding token, {config.pad_token_id}, and the tokenizer's is "
            f"{tokenizer.pad_token_id}; both must be the same"
        )


def require_same_tokens(tokenizer: Any, other: Any, name: str) -> None:
    """That a student's own folder `name` was made for the tokens that the run's tokenizer (the teacher's) gives.

    Raises:
        UserError: its tokenizer (`other`) has another vocabulary or splits text otherwise.
    """
    if tokenizer.get_vocab() != other.get_vocab():
        raise UserError(
            f"student.init: the vocabulary of {name} ({len(other)} tokens) is not the teacher's ({len(tokenizer)} tokens); "
            "both must read the same tokens"
        )
    for probe in PROBES:
        if tokenizer(*probe)["input_ids"] != other(*probe)["input_ids"]:
            raise UserError(
                f"student.init: the tokenizer of {name} splits {' + '.join(map(repr, probe))} otherwise than the teacher's; "
                "both must read the same tokens"
            )
