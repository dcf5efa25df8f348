"""A tokenizer cut to the tokens in use: the same tokens and logits for texts of kept tokens, and no text out of reach."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import sentences
from families import BERT_SPECIAL, DEEP, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from benchmarks.faults.tiny import BAD, GOOD, PLAIN
from pkd_dist.data import trimming
from pkd_dist.data.tokens import TokenSet
from pkd_dist.errors import UserError
from pkd_dist.model.vocabulary import required_ids, trim_embedding

TRAIN = [text for text, _ in sentences(60, 1) if "superb" not in text]
OTHERS = [
    "superb", "unfathomably movies", "Zoë's naïve plot", "電影 很好", "a 😀 film 😀", "кино", "\ttab  and\nlines ", "",
    "goodgoodgood superbly", "x" * 120, "[MASK] <mask> it", "é́",
]  # fmt: skip
CORPUS = [*TRAIN, *(f"{word} {word}s un{word}ly" for word in [*GOOD, *BAD, *PLAIN]), "電影 很好 naïve кино Zoë"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def wordpiece(folder):
    letters = "abcdefghijklmnopqrstuvwxyz'電影"
    pieces = [
        *BERT_SPECIAL,
        "[unused0]",
        *GOOD,
        *BAD,
        *PLAIN,
        "un",
        "##ly",
        "##ing",
        *letters,
        *(f"##{c}" for c in letters),
    ]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n", encoding="utf-8")
    hf.BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    return hf.BertConfig, {"pad_token_id": 0}


def _merges(size, special):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def roberta(folder):
    model = json.loads(_merges(420, ROBERTA).to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    hf.RobertaTokenizer(vocab=model["vocab"], merges=merges, model_max_length=64).save_pretrained(folder)
    return hf.RobertaConfig, {"pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": 66}


def modernbert(folder):
    """Special tokens come last, beside added ones that are not special."""
    made = _merges(400, [])
    made.decoder = decoders.ByteLevel()
    made.add_tokens(["  ", "||IP||"])
    made.add_special_tokens(["[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]"])
    start, end = (made.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", start), ("[SEP]", end)]
    )
    hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        unk_token="[UNK]", model_max_length=64, model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    ids = {"pad_token_id": made.token_to_id("[PAD]"), "cls_token_id": start, "sep_token_id": end}
    return hf.ModernBertConfig, ids | {"bos_token_id": start, "eos_token_id": end, "local_attention": 4}


def _pieces(special):
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=250, unk_token="<unk>", show_progress=False))
    pieces = json.loads(made.to_str())["model"]["vocab"]
    return [*((token, 0.0) for token in special), *((piece, score) for piece, score in pieces if piece != "<unk>")]


def xlm_roberta(folder):
    vocabulary = [*_pieces(ROBERTA[:4]), ("<mask>", 0.0)]
    hf.XLMRobertaTokenizer(vocab=vocabulary, model_max_length=64).save_pretrained(folder)
    return hf.XLMRobertaConfig, {"pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": 66}


def deberta(folder):
    vocabulary = _pieces(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    tokenizer = hf.DebertaV2Tokenizer(vocab=vocabulary, unk_id=3, model_max_length=64)
    tokenizer.save_pretrained(folder)
    return hf.DebertaV2Config, {"pad_token_id": 0, "relative_attention": True, "position_biased_input": False}


@dataclasses.dataclass
class Cut:
    """A tokenizer and a classifier, before and after."""

    before: hf.PreTrainedTokenizerBase
    after: hf.PreTrainedTokenizerBase
    full: hf.PreTrainedModel
    trimmed: hf.PreTrainedModel
    kept: np.ndarray
    folder: object


@pytest.fixture(scope="module", params=[wordpiece, roberta, modernbert, xlm_roberta, deberta], ids=lambda f: f.__name__)
def cut(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    (folder / "before").mkdir()
    kind, fields = request.param(folder / "before")
    before = hf.AutoTokenizer.from_pretrained(folder / "before")
    config = kind(
        **(DEEP | {"num_hidden_layers": 1} | fields | {"vocab_size": len(before) + 3})
    )  # rows beyond the tokens
    torch.manual_seed(1)
    full = hf.AutoModelForSequenceClassification.from_config(config).eval()
    counts = trimming.count_tokens([np.concatenate(before(TRAIN)["input_ids"])], config.vocab_size)
    trimming.require_trimmable(before)
    kept = trimming.kept_ids(before, counts, 1, required_ids(config))
    after = trimming.trim(before, kept, folder / "after")
    trimmed = copy.deepcopy(full)
    trim_embedding(trimmed, kept)
    return Cut(before, after, full, trimmed, kept, folder / "after")


def test_tokens_are_cut(cut):
    assert len(cut.after) == len(cut.kept) == cut.trimmed.config.vocab_size < len(cut.before)
    assert cut.trimmed.get_input_embeddings().num_embeddings == len(cut.kept)
    names = {id_: token for token, id_ in cut.before.get_vocab().items()}
    assert cut.after.get_vocab() == {names[id_]: new for new, id_ in enumerate(cut.kept.tolist())}
    for name in ("pad", "cls", "sep", "mask", "unk"):
        assert getattr(cut.after, f"{name}_token") == getattr(cut.before, f"{name}_token")
    assert cut.trimmed.config.pad_token_id == cut.after.pad_token_id


def test_texts_of_kept_tokens_have_the_same_tokens_and_logits(cut):
    new = np.full(cut.full.config.vocab_size, -1)
    new[cut.kept] = np.arange(len(cut.kept))
    for texts in ((TRAIN,), (TRAIN, TRAIN[::-1])):
        ids = cut.before(*texts)["input_ids"]
        assert cut.after(*texts)["input_ids"] == [new[row].tolist() for row in ids]
    inputs = [tokenizer(TRAIN, padding=True, return_tensors="pt") for tokenizer in (cut.before, cut.after)]
    with torch.inference_mode():
        wanted, found = (model(**given).logits for model, given in zip((cut.full, cut.trimmed), inputs, strict=True))
    assert torch.equal(wanted, found)


def test_every_other_text_can_still_be_encoded(cut):
    for text in OTHERS:
        before, after = (tokenizer(text)["input_ids"] for tokenizer in (cut.before, cut.after))
        assert after.count(cut.after.unk_token_id) <= before.count(cut.before.unk_token_id), text
        if cut.before.unk_token_id not in before:
            skipped = {"skip_special_tokens": True}
            assert cut.after.decode(after, **skipped) == cut.before.decode(before, **skipped), text
    assert any(cut.after.tokenize(text) != cut.before.tokenize(text) for text in OTHERS), "no text lost a token"


def test_the_file_alone_gives_the_same_tokens(cut):
    alone = Tokenizer.from_file(str(cut.folder / "tokenizer.json"))
    alone.no_padding()
    alone.no_truncation()
    for text in [*TRAIN, *OTHERS]:
        assert alone.encode(text).ids == cut.after(text)["input_ids"]
    assert np.array_equal(trimming.read_kept(cut.folder), cut.kept)


def test_rare_tokens_are_cut_by_their_count(cut):
    counts = trimming.count_tokens([np.concatenate(cut.before(TRAIN)["input_ids"])], cut.full.config.vocab_size)
    fewer = trimming.kept_ids(cut.before, counts, 20, ())
    assert set(fewer) < set(cut.kept) and set(np.flatnonzero(counts >= 20)) <= set(fewer)


def test_tokens_with_a_character_that_has_none_of_its_own_are_kept():
    """Else their words would be unknown."""
    made = Tokenizer(
        models.WordPiece({"[UNK]": 0, "a": 1, "##a": 2, "b": 3, "aaa": 4, "aab": 5, "##ba": 6}, unk_token="[UNK]")
    )
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
    assert trimming.kept_ids(tokenizer, np.zeros(7, int), 1, ()).tolist() == [0, 1, 2, 3, 5, 6]


def test_a_bpe_keeps_the_merges_of_a_word_that_is_kept():
    """`abcd` is (ab)(cd): it needs `ab` and `cd`, not `bc`, although a merge of `bc` and `d` exists."""
    ids = {token: i for i, token in enumerate(["a", "b", "c", "d", "ab", "cd", "bc", "bcd", "abcd", "[UNK]"])}
    merges = [("a", "b"), ("c", "d"), ("b", "c"), ("bc", "d"), ("ab", "cd")]
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(ids, merges)), unk_token="[UNK]")
    counts = np.zeros(10, int)
    counts[ids["abcd"]] = 1
    kept = trimming.kept_ids(tokenizer, counts, 1, ())
    assert [tokenizer.convert_ids_to_tokens(int(i)) for i in kept] == ["a", "b", "c", "d", "ab", "cd", "abcd", "[UNK]"]


def tokens(*rows):
    none = np.zeros(len(rows), int)
    offsets = np.cumsum([0, *map(len, rows)])
    return TokenSet(np.concatenate(rows), None, offsets, none, none, "", "", 0)


def test_a_cut_that_changes_tokens_is_refused():
    kept = np.array([0, 2, 5])
    full = tokens([0, 2], [0, 3, 5])
    trimming.require_exact(full, tokens([0, 1], [0, 0, 0, 2]), kept, None)  # the second text has a token that was cut
    for other in (tokens([0, 2], [0, 2]), tokens([0, 1, 1], [0, 2])):
        with pytest.raises(UserError, match="splits texts differently"):
            trimming.require_exact(full, other, kept, None)
    trimming.require_exact(full, tokens([0, 1], [0, 2]), kept, unknown=5)
    with pytest.raises(UserError, match="splits texts differently"):
        trimming.require_exact(full, tokens([0, 1], [0, 2, 2]), kept, unknown=5)


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (make_tokenizer(BERT_SPECIAL), "WordLevel, which does not spell words from pieces"),
        (hf.CanineTokenizer(), "runs in Python and has no tokenizer.json"),
        (
            hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(end_of_word_suffix="</w>"))),
            "a BPE that marks where a word continues or ends",
        ),
    ],
)
def test_other_tokenizers_are_refused(tokenizer, why):
    with pytest.raises(UserError, match=why) as refused:
        trimming.require_trimmable(tokenizer)
    assert refused.value.setting == "student.vocabulary" and "use all" in str(refused.value)
