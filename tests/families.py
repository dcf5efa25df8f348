"""A tiny random model of each tested family, with its tokenizer; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from benchmarks.faults.tiny import BAD, GOOD, PLAIN

WORDS = list(dict.fromkeys([*GOOD, *BAD, *PLAIN, *"abcdefghijklmnopqrstuvwxyz"]))
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SIZE = len(WORDS) + 5

SHAPE: dict[str, Any] = {"vocab_size": SIZE, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
DEEP: dict[str, Any] = SHAPE | {"intermediate_size": 64, "max_position_embeddings": 64}
BERT: dict[str, Any] = DEEP | {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}
BERT |= {"bos_token_id": None, "eos_token_id": None}
FAMILIES: dict[str, tuple[type[hf.PreTrainedConfig], dict[str, Any]]] = {
    "bert": (hf.BertConfig, BERT),
    "roberta": (hf.RobertaConfig, DEEP | {"pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": 66}),
    "distilbert": (
        hf.DistilBertConfig,
        {"vocab_size": SIZE, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    ),
    "electra": (hf.ElectraConfig, BERT | {"embedding_size": 16}),
    "albert": (hf.AlbertConfig, BERT | {"embedding_size": 16}),
    "deberta-v2": (
        hf.DebertaV2Config,
        BERT
        | {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 8, "position_biased_input": False}
        | {"share_att_key": True, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3},
    ),
    "modernbert": (hf.ModernBertConfig, BERT | {"local_attention": 4, "classifier_pooling": "mean"}),
}
"""Family -> its configuration class and the fields of a tiny model, including those that only this family has."""


def shape_of(family: str, **fields: Any) -> hf.PreTrainedConfig:
    kind, own = FAMILIES[family]
    return kind(**(own | fields))


def make_tokenizer(special: list[str]) -> hf.PreTrainedTokenizerFast:
    """Return a tokenizer of words, with [CLS] first, [SEP] after each text, and token types 0 and 1.

    Args:
        special: BERT_SPECIAL or ROBERTA_SPECIAL.
    """
    pad, unknown, start, end = (special[i] for i in ((0, 1, 2, 3) if special[0] == "[PAD]" else (1, 3, 0, 2)))
    ids = {word: i for i, word in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", pair=f"{start} $A {end} $B:1 {end}:1",
        special_tokens=[(token, ids[token]) for token in (start, end)],
    )  # fmt: skip
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, unk_token=unknown, cls_token=start, sep_token=end, mask_token=special[4],
        model_max_length=64, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def tokenizer_of(family: str) -> hf.PreTrainedTokenizerFast:
    return make_tokenizer(ROBERTA_SPECIAL if family == "roberta" else BERT_SPECIAL)


def make_folder(
    folder: Path, family: str, classifier: bool = False, names: tuple[str, ...] = ("no", "yes"), **fields: Any
) -> str:
    """Write a Hugging Face folder and return its path.

    Its tokenizer returns token types for every family.

    Args:
        classifier: A classifier of the classes `names`, not a body alone.
        fields: Of the model's configuration.
    """
    torch.manual_seed(3)
    config = shape_of(family, **fields)
    if classifier:
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    kind = hf.AutoModelForSequenceClassification if classifier else hf.AutoModel
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # no two layers are alike, no bias is 0
            parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tokenizer_of(family).save_pretrained(folder)
    return str(folder)


MARKS = [".", ",", "!", "-", "'", "$", "(", ")", ";"]


def _byte_pairs() -> dict[str, int]:
    return {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=5)}


def _pieces(*special: str) -> list[tuple[str, float]]:
    words = [f"▁{word}" for word in WORDS]
    return [(piece, 0.0) for piece in special] + [
        (piece, -3.0) for piece in dict.fromkeys([*words, *WORDS, "▁", *MARKS])
    ]


def _word_pieces(kind: type) -> hf.PreTrainedTokenizerBase:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    suffixes = [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    return kind(vocab={piece: i for i, piece in enumerate([*special, *WORDS, *MARKS, *suffixes])})


def _modernbert() -> hf.PreTrainedTokenizerBase:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(special)} | _byte_pairs(), []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokens = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=True,
        **tokens,
    )


TOKENIZERS = {
    "bert": lambda: _word_pieces(hf.BertTokenizerFast),
    "roberta": lambda: hf.RobertaTokenizerFast(
        vocab={"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4} | _byte_pairs(), merges=[]
    ),
    "distilbert": lambda: _word_pieces(hf.DistilBertTokenizerFast),
    "electra": lambda: _word_pieces(hf.ElectraTokenizerFast),
    "albert": lambda: hf.AlbertTokenizerFast(vocab=_pieces("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")),
    "deberta-v2": lambda: hf.DebertaV2TokenizerFast(vocab=_pieces("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")),
    "modernbert": _modernbert,
}
"""For each family, a tokenizer of the kind that its published models have."""
