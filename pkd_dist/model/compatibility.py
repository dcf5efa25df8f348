"""Check that a model can be distilled, and that it matches the tokenizer and the length of the run's inputs."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from pkd_dist.errors import UserError
from pkd_dist.model.families import positions_follow_padding

KNOWN_FAMILIES = (
    "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert", "deberta-v2", "modernbert",
)  # fmt: skip
"""Tested `model_type`s. Other encoders may work: the check is of what a model needs, not of its name."""
_LONGEST_WITHOUT_LIMIT = 512
"""Tokens of an input where neither the model nor its tokenizer has a limit."""
_NO_STATE_PER_TOKEN = ("canine", "funnel", "perceiver")
PROBES = (
    ("A film by José Núñez, isn't it?  Yes: 3.5/5!",),
    ("Über-naïve PLOT; don't\twatch…", "#2 (1999) — 10€, www.example.org 電影 😀"),
)
"""Texts that tokenizers split differently: case, accents, spaces, numbers, punctuation, other scripts, a pair."""


def longest_input(config: PretrainedConfig) -> int | None:
    """Return the number of tokens that a model has positions for; None if it has no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0 or not getattr(config, "position_biased_input", True):
        return None  # DeBERTa without absolute positions clips relative ones
    return positions - (config.pad_token_id + 1 if positions_follow_padding(config) else 0)


def usual_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokens at which a model's inputs are truncated unless told otherwise: its tokenizer's limit, if it has one.

    The tokenizer of a model that this project trained is limited to the length it was trained with.
    """
    longest = longest_input(config) or _LONGEST_WITHOUT_LIMIT
    return min(tokenizer.model_max_length, longest)


def require_compatible(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    name: str,
    key: str,
    length_key: str = "task.max_length",
    multiple_choice: bool = False,
) -> None:
    """Check that a model can be distilled and can read the tokenizer's output.

    Args:
        config: Of the model.
        tokenizer: That it is to read with.
        max_length: Of its inputs, in tokens.
        name: What the user calls the model.
        key: The setting that names it.
        length_key: The setting of `max_length`.
        multiple_choice: It is to score the options of an example.

    Raises:
        UserError: The model is not an encoder whose first token represents the text, or it does not match the tokenizer
            or the length.
    """
    family = config.model_type
    causal, masked = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    known = f"known to work: {', '.join(KNOWN_FAMILIES)}"
    if family not in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise UserError(f"{key}: {name} is a {family}, which has no sequence classifier in transformers; {known}")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{key}: {name} is a {family}, an encoder-decoder; use an encoder alone; {known}")
    if getattr(config, "is_decoder", False) or (family in causal and family not in masked):
        raise UserError(
            f"{key}: {name} is a {family}, which predicts the next token: its first token does not represent the text, "
            f"as an encoder's does; {known}"
        )
    if family in _NO_STATE_PER_TOKEN:
        raise UserError(
            f"{key}: {name} is a {family}, whose layers do not return one hidden state for each token; {known}"
        )
    if multiple_choice and family not in modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES:
        raise UserError(f"{key}: {name} is a {family}, which has no multiple choice in transformers; {known}")
    require_length(config, max_length, name, length_key)
    if tokenizer.pad_token_id is None:
        raise UserError(f"{key}: the tokenizer of {name} has no padding token; set its pad_token")
    if tokenizer.cls_token_id is None or tokenizer(PROBES[0][0])["input_ids"][0] != tokenizer.cls_token_id:
        raise UserError(
            f"{key}: the tokenizer of {name} does not put its cls_token first, which is where a classifier reads; {known}"
        )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{key}: {name} embeds {config.vocab_size} tokens, the tokenizer has {len(tokenizer)}; use a model "
            "and a tokenizer that belong together"
        )
    if positions_follow_padding(config) and tokenizer.pad_token_id != config.pad_token_id:
        raise UserError(
            f"{key}: {name} counts positions from its padding token, {config.pad_token_id}, but the tokenizer's is "
            f"{tokenizer.pad_token_id}; both must be the same"
        )


def require_length(config: PretrainedConfig, max_length: int, name: str, key: str) -> None:
    """Raise UserError if inputs of `max_length` tokens are longer than a model can read."""
    longest = longest_input(config)
    if longest and max_length > longest:
        raise UserError(f"{max_length} is more than {name} can read; give at most {longest}", key)


def token_difference(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """Return how the tokens of another tokenizer differ from those of the teacher's; None if they are the same."""
    if tokenizer.get_vocab() != other.get_vocab():
        return f"another vocabulary, {len(other):,} tokens instead of {len(tokenizer):,}"
    for probe in PROBES:
        if tokenizer(*probe)["input_ids"] != other(*probe)["input_ids"]:
            return f"{' + '.join(map(repr, probe))} is split differently"
    return None
