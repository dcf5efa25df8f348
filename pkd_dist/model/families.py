"""The same computation with less of it: what distillation never uses is not computed, what never changes is not trained.

Two exact savings, applied to a live model in place; its parameters keep their names.

`only_first_token`: classifiers read the last layer at [CLS] alone, so that layer computes the first token alone, which
takes nothing but a weighted mean of the others' states. (A third of a 3-layer encoder's arithmetic.)

`CompactVocabulary`: a data set uses a part of the vocabulary. Rows of the embedding that never occur get no gradient, so
AdamW only decays them; they are taken out of the trained table and put back, decayed by the product of all
(1 - learning rate * weight decay), when weights are exported. Optimizer, gradients and messages shrink with the table.

Where a model's family does not allow a saving it is left as it is.
"""

from __future__ import annotations

from typing import Any

_BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
"""Families of one layer structure, whose classification heads read the first token of the last layer; DistilBERT's
layer is the same by other names."""
_POSITIONS_FOLLOW_PADDING = (
    "roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "data2vec-text", "ibert", "mpnet",
    "longformer", "luke", "xmod",
)  # fmt: skip


def positions_follow_padding(config: Any) -> bool:
    """Whether a model counts positions from its padding token's id, over the tokens that are not it."""
    return getattr(config, "model_type", None) in _POSITIONS_FOLLOW_PADDING


def is_bert_like(config: Any) -> bool:
    """Whether a model's layers are those of BERT or DistilBERT."""
    if getattr(config, "model_type", None) not in (*_BERT_LIKE, "distilbert") or getattr(config, "is_decoder", False):
        return False
    return getattr(config, "position_embedding_type", "absolute") == "absolute"
