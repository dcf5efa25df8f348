"""Neighbours of words: which tokens are whole words, which words are nearest, and how a word is replaced."""

import re

import numpy as np
import pytest
import torch
import transformers as hf
from families import make_folder
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from pkd_dist.data import neighbours as module
from pkd_dist.data.neighbours import NEAREST, Neighbours, whole_words
from pkd_dist.errors import UserError
from pkd_dist.model.encoder import load_model
from pkd_dist.model.word_embeddings import read_word_embeddings

SPECIAL = ["[UNK]", "[MASK]"]


def wordpiece():
    pieces = [
        *SPECIAL,
        *"abcdefghilmnoprstu!.",
        *(f"##{x}" for x in "abcdefghilmnoprstu"),
        "film",
        "##film",
        "plot",
        "ing",
        "##ing",
    ]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made, {"film", "plot", "ing"}


def byte_level_bpe():
    merges = [
        ("f", "i"),
        ("l", "m"),
        ("fi", "lm"),
        ("Ġ", "film"),
        ("p", "l"),
        ("o", "t"),
        ("pl", "ot"),
        ("Ġ", "plot"),
        ("Ġ", "F"),
    ]
    merges += [("ĠF", "i"), ("ĠFi", "lm"), ("Ã", "©"), ("Ġ", "Ã©"), ("ĠÃ©", "t"), ("ĠÃ©t", "Ã©"), ("Ġ", "a")]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = dict.fromkeys([*SPECIAL, *letters, *("".join(pair) for pair in merges)])
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made, {"film", "plot", "Fi", "Film", "ét", "été"}


def unigram():
    pieces = [*SPECIAL, "▁", *"abcdefgilmnoprstué", "▁film", "film", "▁plot", "ing", "▁été", "▁Film", "F"]
    made = Tokenizer(models.Unigram([(piece, -10.0 + len(piece)) for piece in pieces], unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made, {"film", "plot", "été", "Film"}


@pytest.mark.parametrize("vocabulary", [wordpiece, byte_level_bpe, unigram])
def test_whole_words_of_every_kind_of_vocabulary(vocabulary):
    made, expected = vocabulary()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", mask_token="[MASK]")
    found = dict(whole_words(tokenizer))
    assert set(found.values()) == expected and len(found) == len(expected)
    for token, text in found.items():
        assert tokenizer.decode([token]).strip() == text
        assert tokenizer(f"a {text}", add_special_tokens=False)["input_ids"][-1] == token


LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [f"{a}{b}" for a in LETTERS[:20] for b in LETTERS[:20]]
CASED = [*SPECIAL, *WORDS, "Ab", "AB", "zz", "yy", "##ab"]
TABLE = np.random.default_rng(3).normal(size=(len(CASED), 16)).astype(np.float32)
TABLE[CASED.index("zz")] = 0


def word_level(words=CASED, lowercase=False):
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if lowercase:
        made.normalizer = normalizers.Lowercase()
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", mask_token="[MASK]")


def substitutes(neighbours, word):
    (row,) = neighbours.rows_of([word]).tolist()
    return [] if row < 0 else [neighbours.substitute(word, row, i) for i in range(neighbours.counts[row])]


def test_the_nearest_words_by_cosine():
    """Against a plain float64 formula."""
    found = Neighbours(word_level(), TABLE, WORDS)
    table = {
        word: row / np.linalg.norm(row) for word, row in zip(CASED, TABLE.astype(np.float64), strict=True) if row.any()
    }
    for word in WORDS[::17]:
        others = {other: row @ table[word] for other, row in table.items() if other.isalpha() and other.lower() != word}
        best = sorted(others, key=others.get, reverse=True)
        if {"Ab", "AB", "ab"} & set(best[: NEAREST + 2]):
            continue  # spellings of one word
        assert substitutes(found, word) == [other.lower() for other in best[:NEAREST]]


def test_a_word_has_the_same_neighbours_whatever_other_words_occur(monkeypatch):
    every = Neighbours(word_level(), TABLE, WORDS)
    monkeypatch.setattr(module, "_ROWS", 3)
    monkeypatch.setattr(module, "_COLUMNS", 7)
    few = Neighbours(word_level(), TABLE, WORDS[5:50:9])
    for word in WORDS[5:50:9]:
        assert substitutes(few, word) == substitutes(every, word)


def test_other_spellings_are_no_neighbours():
    table = TABLE.copy()
    near = ["Ab", "AB", "yy"]
    for word in near:
        table[CASED.index(word)] = table[CASED.index("ab")] + 0.001
    found = Neighbours(word_level(), table, ["ab", "Ab"])
    assert substitutes(found, "ab")[0] == "yy" and len(substitutes(found, "ab")) == NEAREST
    assert not {"Ab", "AB", "ab"} & set(substitutes(found, "Ab")) and substitutes(found, "Ab")[0] == "Yy"


def test_punctuation_and_capitals_are_kept_and_other_words_stay():
    words = ["ab", "Ab,", "(AB)", "“ab”…", "a1b", "ab-ac", "x", "zz", "unheard", "--", "ab1", "[MASK]"]
    found = Neighbours(word_level(lowercase=True), TABLE, words)
    first = substitutes(found, "ab")[0]
    assert substitutes(found, "Ab,")[0] == f"{first.capitalize()},"
    assert substitutes(found, "(AB)")[0] == f"({first.upper()})"
    assert substitutes(found, "“ab”…")[0] == f"“{first}”…"
    assert found.rows_of(words[4:]).tolist() == [-1] * 8
    with pytest.raises(UserError, match=r"^task\.augment\.neighbours: no word of the training text is a single token"):
        Neighbours(word_level(), TABLE, words[4:])


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "albert", "deberta-v2", "modernbert"])
def test_the_table_of_each_family(family, tmp_path):
    for classifier in (False, True):
        folder = make_folder(tmp_path / f"{classifier}", family, classifier)
        expected = load_model(folder, new_head=True).get_input_embeddings().weight.detach().numpy()
        assert np.array_equal(read_word_embeddings(folder), expected)


def test_the_table_in_shards_and_without_safetensors(tmp_path):
    folder = make_folder(tmp_path / "whole", "bert")
    model = hf.AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert np.array_equal(read_word_embeddings(str(tmp_path / "shards")), read_word_embeddings(folder))
    half = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    save_file(half, tmp_path / "whole/model.safetensors")
    assert read_word_embeddings(folder).dtype == np.float32
    save_file({"other": torch.zeros(1)}, tmp_path / "whole/model.safetensors")
    with pytest.raises(
        UserError, match=re.escape("its word embeddings (embeddings.word_embeddings.weight) are not in")
    ):
        read_word_embeddings(folder)
    (tmp_path / "whole/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors; convert its weights, or set task\.augment"):
        read_word_embeddings(folder)
