"""What the code knows about families of transformers models, by their `model_type`; where their encoder layers are."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

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


def num_layers(config: PretrainedConfig) -> int:
    """Return the number of encoder layers."""
    return int(config.num_hidden_layers)


def encoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList | None]:
    """Return the name and the list of a model's encoder layers; ("", None) if they are not one list of their own."""
    depth = num_layers(model.config)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return found[0] if len(found) == 1 and not shares_layers(model.config) else ("", None)


def shares_layers(config: PretrainedConfig) -> bool:
    """Return whether several layers share one set of weights (ALBERT)."""
    return getattr(config, "num_hidden_groups", None) is not None
