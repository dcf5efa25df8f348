"""What the code knows about families of transformers models, by their `model_type`."""

from __future__ import annotations

from transformers import PretrainedConfig

_BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
"""Families with BERT's layer, whose classification heads read the first token of the last layer."""
_POSITIONS_FOLLOW_PADDING = (
    "roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "data2vec-text", "ibert", "mpnet",
    "longformer", "luke", "xmod",
)  # fmt: skip


def positions_follow_padding(config: PretrainedConfig) -> bool:
    """Return whether a model counts positions from its padding token's id upwards, skipping padding."""
    return getattr(config, "model_type", None) in _POSITIONS_FOLLOW_PADDING


def is_bert_like(config: PretrainedConfig) -> bool:
    """Return whether a model has BERT's or DistilBERT's layers (the same layer under other names)."""
    if getattr(config, "model_type", None) not in (*_BERT_LIKE, "distilbert") or getattr(config, "is_decoder", False):
        return False
    return getattr(config, "position_embedding_type", "absolute") == "absolute"
