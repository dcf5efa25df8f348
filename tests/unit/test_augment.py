"""Augmentation: how copies are made, and what they depend on."""

import dataclasses
import hashlib
import tracemalloc

import numpy as np
import pytest
from families import BERT_SPECIAL, make_tokenizer

from pkd_dist.config.task import Augment
from pkd_dist.data import augment as module
from pkd_dist.data.augment import augment
from pkd_dist.data.examples import Split, example_ids, is_labelled
from pkd_dist.data.neighbours import Neighbours
from pkd_dist.errors import UserError

WORDS = ["the", "a", "film", "plot", "is", "was", "good", "bad", "very", "not", "dull", "fine", "actor", "scene"]
RNG = np.random.default_rng(5)


def split_of(*columns, regression=False):
    labels = np.zeros(len(columns[0]), np.float32 if regression else np.int64)
    return Split(example_ids(columns), columns, labels, () if regression else ("0", "1"), "train.tsv")


def random_texts(count, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(3, 12))) for _ in range(count)]


TOKENIZER = make_tokenizer(BERT_SPECIAL)
TABLE = RNG.normal(size=(len(TOKENIZER), 8)).astype(np.float32)


def neighbours(words):
    return Neighbours(TOKENIZER, TABLE, words)


def copies(split, seed=1, mask_token="[MASK]", **settings):
    settings = {"copies": 1, "mask": 0, "replace": 0, "ngram": 0, "seed": seed} | settings
    return augment(split, Augment(**settings), mask_token, neighbours)


def rows(split):
    return set(zip(*split.texts, strict=True))


SINGLE = split_of(random_texts(400, 1))
PAIRS = split_of(random_texts(600, 2), random_texts(600, 3))
UNLIKE = split_of([" ".join(f"{word}{i}" for word in WORDS) for i in range(500)])
"""No word is in two texts, so no two texts have a common copy."""
ALL = {"copies": 3, "mask": 0.1, "replace": 0.1, "ngram": 0.25}
NEAR = ALL | {"neighbours": 0.3}
BOTH = pytest.mark.parametrize(
    ("split", "settings"), [(SINGLE, ALL), (PAIRS, ALL), (PAIRS, NEAR)], ids=["single", "pairs", "neighbours"]
)


def test_words_are_masked_and_replaced_with_the_given_probabilities():
    made = copies(split_of([" ".join(WORDS * 20) + f" {i}" for i in range(50)]), mask=0.2, replace=0.3)
    words = [word for text in made.texts[0] for word in text.split()]
    assert len(words) == 50 * (len(WORDS) * 20 + 1), "no word is lost"
    original = [*WORDS * 20, "last"] * 50
    assert np.mean([word == "[MASK]" for word in words]) == pytest.approx(0.2, abs=0.01)
    other = np.mean([word != "[MASK]" and word != before for word, before in zip(words, original, strict=True)])
    assert other == pytest.approx(0.3 * (1 - 1 / len(WORDS)), abs=0.02), "a word may be drawn for itself"


def test_words_are_drawn_by_their_frequency():
    made = copies(split_of([f"{i}" + " rare often often often often" * 9 for i in range(300)]), replace=1)
    words = [word for text in made.texts[0] for word in text.split()]
    assert words.count("often") / len(words) == pytest.approx(0.8, abs=0.02)
    assert words.count("rare") / len(words) == pytest.approx(0.2, abs=0.02)


def test_runs_of_one_to_five_words():
    made = copies(SINGLE, copies=4, ngram=1)
    lengths = {len(text.split()) for text in made.texts[0]}
    assert lengths == {1, 2, 3, 4, 5}
    whole = " | ".join(SINGLE.texts[0])
    assert all(text in whole for text in made.texts[0])
    part = copies(UNLIKE, ngram=0.4)
    assert len(part) / 500 == pytest.approx(0.4, abs=0.1), "the others are unchanged, so they are removed"


def test_one_or_both_texts_of_a_pair_are_changed():
    made = copies(split_of(UNLIKE.texts[0], UNLIKE.texts[0]), mask=0.5)
    masked = [tuple("[MASK]" in text for text in pair) for pair in zip(*made.texts, strict=True)]
    for what in ((True, False), (False, True), (True, True)):
        assert masked.count(what) / len(masked) == pytest.approx(1 / 3, abs=0.06)


def test_copies_are_those_of_earlier_versions():
    for split, digest in ((SINGLE, "0b58b6489ccbb59b"), (PAIRS, "dfa4518a6e4da78f")):
        made = "\n".join("\t".join(texts) for texts in zip(*copies(split, **ALL).texts, strict=True))
        assert hashlib.sha256(made.encode()).hexdigest()[:16] == digest


def test_words_become_neighbours_with_the_given_probability():
    text = "The film, unheard of, is GOOD! " * 50
    made = copies(split_of([f"{text}{i}" for i in range(50)]), neighbours=0.3)
    pairs = [(before, after) for new in made.texts[0] for before, after in zip(text.split(), new.split(), strict=False)]
    kinds = {}
    for before, after in pairs:
        kinds.setdefault(before, []).append(after)
    for word in ("The", "film,", "is", "GOOD!"):
        assert np.mean([after != word for after in kinds[word]]) == pytest.approx(0.3, abs=0.03)
        known = neighbours(text.split())
        (row,) = known.rows_of([word])
        allowed = [known.substitute(word, row, i) for i in range(known.counts[row])]
        drawn = [kinds[word].count(other) for other in allowed]
        assert sum(drawn) + kinds[word].count(word) == 2500, "only neighbours replace a word"
        assert min(drawn) > 0.6 * np.mean(drawn), "each is as likely as any other"
    assert set(kinds["unheard"]) == {"unheard"} and set(kinds["of,"]) <= {"of,"} | {
        f"{w}," for w in TOKENIZER.get_vocab()
    }
    more = copies(SINGLE, **ALL | {"neighbours": 0.2, "copies": 1})
    less = copies(SINGLE, **ALL | {"copies": 1})
    assert rows(more) & rows(less), "copies without a neighbour are as before"


@BOTH
def test_a_copy_depends_only_on_seed_example_and_number(split, settings):
    made = copies(split, **settings)
    again = copies(split, **settings)
    assert made.texts == again.texts and np.array_equal(made.ids_N, again.ids_N)
    order = RNG.permutation(len(split))
    shuffled = Split(
        split.ids_N[order], tuple([c[i] for i in order] for c in split.texts), split.labels_N, ("0", "1"), ""
    )
    assert rows(copies(shuffled, **settings)) == rows(made)
    assert set(copies(shuffled, **settings).ids_N) == set(made.ids_N)
    assert rows(copies(split, **settings | {"copies": 2})) < rows(made), "one more copy changes none of the others"
    assert rows(copies(split, 2, **settings)) != rows(made)


@BOTH
def test_copies_do_not_depend_on_the_block_size(split, settings, monkeypatch):
    made = copies(split, **settings)
    monkeypatch.setattr(module, "_BLOCK_EXAMPLES", 7)
    again = copies(split, **settings)
    assert made.texts == again.texts and np.array_equal(made.ids_N, again.ids_N)


def test_no_repeats_and_no_training_text():
    made = copies(SINGLE, **ALL)
    assert len(rows(made)) == len(made) and not rows(made) & rows(SINGLE)
    assert not set(made.ids_N) & set(SINGLE.ids_N) and len(set(made.ids_N)) == len(made)
    assert made.notes[0].startswith(f"removed {1200 - len(made)} of 1200 texts: ")
    assert "already in train.tsv" in made.notes[0] and "repeated" in made.notes[0]
    assert made.labels_N.dtype == np.int64 and not is_labelled(made.labels_N).any()
    assert (made.classes, made.source) == (("0", "1"), "train.tsv, augmented")
    number = copies(split_of(random_texts(9, 1), regression=True), mask=0.5)
    assert number.labels_N.dtype == np.float32 and not is_labelled(number.labels_N).any()


def test_memory_is_a_few_numbers_per_new_text():
    def peak(number):
        tracemalloc.start()
        made = copies(UNLIKE, copies=number, mask=0.2, ngram=0.25)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, len(made)

    peak(1)  # imports
    (small, few), (large, many) = peak(4), peak(60)
    assert many - few > 20_000 and (large - small) / (many - few) < 60, "bytes per text"


def test_errors():
    with pytest.raises(
        UserError, match=r"^task\.augment\.mask: the teacher's tokenizer has no mask token; set it to 0$"
    ):
        copies(SINGLE, mask_token=None, mask=0.1)
    assert len(copies(SINGLE, mask_token=None, replace=0.5))
    with pytest.raises(ValueError, match=r"neighbours 0\.6 must add up to at most 1"):
        copies(SINGLE, mask=0.3, replace=0.2, neighbours=0.6)
    with pytest.raises(UserError, match="augmented: no text is left: removed 400 of 400 texts"):
        copies(dataclasses.replace(SINGLE))
