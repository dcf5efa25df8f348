"""Layer maps against the tables of the paper."""

import pytest

from pkd_dist.config.distill import Distill
from pkd_dist.config.schema import Cache
from pkd_dist.errors import UserError
from pkd_dist.model.layers import (
    attention_pairs,
    copied_layers,
    kept_layers,
    layer_map,
    paired_layers,
    patience_pairs,
    skip_is_rounded,
)


@pytest.mark.parametrize(
    ("patience", "teacher", "student", "expected"),
    [
        ("skip", 12, 6, (2, 4, 6, 8, 10)),
        ("skip", 12, 3, (4, 8)),
        ("last", 12, 6, (7, 8, 9, 10, 11)),
        ("last", 12, 3, (10, 11)),
        ("skip", 6, 3, (2, 4)),
        ("skip", 12, 1, ()),
        ("last", 12, 1, ()),
        ("skip", 12, 5, (2, 5, 7, 10)),
        ([1, 5], 12, 3, (1, 5)),
    ],
)
def test_pairs(patience, teacher, student, expected):
    assert paired_layers(patience, teacher, student) == expected


@pytest.mark.parametrize("student", range(1, 13))
@pytest.mark.parametrize("patience", ["skip", "last"])
def test_pairs_are_increasing_and_in_range_for_every_depth(patience, student):
    pairs = paired_layers(patience, 12, student)
    assert len(pairs) == student - 1
    assert list(pairs) == sorted(set(pairs))
    assert all(1 <= layer <= 12 for layer in pairs)


def test_rounding_is_known():
    assert skip_is_rounded(12, 5)
    assert not skip_is_rounded(12, 6)


def test_patience_pairs_of_a_configuration():
    assert patience_pairs(Distill(), 12, 3) == ((1, 4), (2, 8))
    assert patience_pairs(Distill(pair_embeddings=True, patience=[2, 5]), 12, 3) == ((0, 0), (1, 2), (2, 5))
    assert patience_pairs(Distill(), 12, 1) == ()
    assert patience_pairs(Distill(preset="seed"), 12, 3) == ((0, 0), (1, 4), (2, 8), (3, 12)), "the OneFlow reference's"
    assert patience_pairs(Distill(pair_last_layer=True, patience=[4, 8, 12]), 12, 3) == ((1, 4), (2, 8), (3, 12))
    assert patience_pairs(Distill(pair_last_layer=True, patience="last"), 12, 3) == ((1, 10), (2, 11), (3, 12))
    assert patience_pairs(Distill(beta=0, pair_embeddings=True), 12, 3) == (), "no weight, no pairs"
    assert patience_pairs(Distill(beta=0, gram=1), 12, 3) == ((1, 4), (2, 8))
    assert patience_pairs(Distill(gram=1, pair_last_layer=True), 12, 1) == ((1, 12),)
    with pytest.raises(
        UserError, match=r"distill\.gram: a student of one layer has none to compare; set distill\.pair_l"
    ):
        patience_pairs(Distill(gram=1), 12, 1)


def test_layers_whose_attention_is_compared():
    assert attention_pairs(Distill(), 12, 3) == ()
    assert attention_pairs(Distill(relations=1), 12, 3) == ((3, 12),)
    assert attention_pairs(Distill(relations=1, relation_layer=10), 12, 3) == ((3, 10),)
    assert attention_pairs(Distill(attention=1), 12, 3) == ((1, 4), (2, 8), (3, 12))
    assert attention_pairs(Distill(attention=1, pair_last_layer=True, patience=[1, 2, 3]), 12, 3) == (
        (1, 1),
        (2, 2),
        (3, 12),
    )
    assert attention_pairs(Distill(attention=1), 12, 1) == ((1, 12),)
    with pytest.raises(
        UserError, match=r"distill\.relation_layer: 13 is out of range; the teacher's layers are 1 to 12"
    ):
        attention_pairs(Distill(relations=1, relation_layer=13), 12, 3)


def test_hidden_states_that_a_loss_needs():
    """Attention is computed from the states that enter a layer; those that are paired too are needed once."""
    found = layer_map(Distill(attention=1, relations=1, patience=[3, 8], pair_embeddings=True), 12, 3)
    assert found.pairs == ((0, 0), (1, 3), (2, 8)) and found.attention == ((1, 3), (2, 8), (3, 12))
    assert found.teacher_states == (0, 3, 8, 2, 7, 11) and found.attention_inputs == (3, 4, 5)
    first = layer_map(Distill(attention=1, patience=[1], pair_embeddings=True, relation_layer=2), 12, 2)
    assert first.teacher_states == (0, 1) and first.attention_inputs == (0, 1)
    assert layer_map(Distill(beta=0, relations=1), 12, 1).teacher_states == (11,)


def test_kept_layers_of_a_cache():
    needed = (0, 4, 2)
    assert kept_layers(Cache(), needed, 6) == (0, 2, 4)
    assert kept_layers(Cache(layers="all"), needed, 6) == (0, 1, 2, 3, 4, 5, 6)
    assert kept_layers(Cache(layers=[6, 4, 2, 0]), needed, 6) == (0, 2, 4, 6)
    assert kept_layers(Cache(), (), 6) == kept_layers(Cache(layers=[]), (), 6) == ()
    with pytest.raises(
        UserError, match=r"cache\.layers: \[0, 4\] lacks teacher layer 2, which the loss compares; add it, or use 'all'"
    ):
        kept_layers(Cache(layers=[0, 4]), needed, 6)
    with pytest.raises(UserError, match=r"cache\.layers: 7 is out of range; the teacher has 6 layers"):
        kept_layers(Cache(layers=[7]), (), 6)


def test_wrong_lists_are_rejected_with_what_is_allowed():
    with pytest.raises(UserError, match=r"names 3 teacher layer.*give 2"):
        paired_layers([1, 2, 3], 12, 3)
    with pytest.raises(UserError, match="layer 13 is out of range; the teacher's layers are 1 to 12"):
        paired_layers([1, 13], 12, 3)
    with pytest.raises(UserError, match="at most the teacher's 4 layers"):
        paired_layers("skip", 4, 6)


def test_copied_layers():
    assert copied_layers([2, 6, 10], 12) == (2, 6, 10)
    assert copied_layers(None, 6) == (1, 3, 5)
    with pytest.raises(UserError, match="counted 0 to 5"):
        copied_layers([1, 6], 6)


@pytest.mark.parametrize("teacher", range(1, 25))
@pytest.mark.parametrize("keep_first", [False, True])
def test_layers_at_even_distance(teacher, keep_first):
    for count in (None, *range(1, teacher + 1)):
        chosen = copied_layers(None, teacher, count, keep_first)
        assert len(chosen) == (count or -(-teacher // 2)) and list(chosen) == sorted(set(chosen))
        assert chosen[-1] == teacher - 1 or chosen == (0,)
        assert chosen[0] == 0 or not keep_first
