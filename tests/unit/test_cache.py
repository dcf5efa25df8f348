"""The teacher cache: rows by example id in every dtype, resumable builds, and never the outputs of another teacher."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, BertConfig

from pkd_dist.data.batches import collate
from pkd_dist.data.tokens import TokenSet
from pkd_dist.distillation import cache_builder
from pkd_dist.distillation.cache import (
    CacheReader,
    Fingerprint,
    Manifest,
    ShardEntry,
    map_tensors,
    read_manifest,
    shard_name,
)
from pkd_dist.distillation.cache_builder import CacheSpec, build
from pkd_dist.distillation.confidence import confident_rows
from pkd_dist.distillation.teacher import LiveTeacher, TeacherBatches, run_teacher
from pkd_dist.distributed.ranks import Ranks
from pkd_dist.distributed.world import World
from pkd_dist.errors import UserError
from pkd_dist.telemetry import Telemetry
from pkd_dist.telemetry.metrics import RunMetrics

EXAMPLES, LAYERS, SHARD_ROWS = 53, (1, 2), 20
FINGERPRINT = Fingerprint("a teacher", "a tokenizer", "some tokens", 32, LAYERS, "float32", "float32", "cls")


@pytest.fixture(scope="module")
def world():
    one = World(Ranks(0, 0, 1, 1, "python"), 60)
    yield one
    one.close()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(3)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 20, size=EXAMPLES))])
    ids = rng.permutation(rng.integers(-(2**63), 2**63 - 1, size=EXAMPLES))  # like hashes: of either sign, unordered
    words = rng.integers(1, 60, size=offsets[-1]).astype(np.int32)
    return TokenSet(words, None, offsets, ids, rng.integers(3, size=EXAMPLES), "", "", 0)


def fill(
    folder, tokens, world, model, dtype="float32", states="cls", make=None, fingerprint=FINGERPRINT, counters=None
):
    """Builds a cache; returns the fingerprint, the rows computed, and the metrics."""
    fingerprint = dataclasses.replace(fingerprint, dtype=dtype, states=states)

    def teacher(layers):
        return LiveTeacher(model, layers, "float32", dtype, states == "tokens", world.device)

    telemetry = Telemetry(RunMetrics(counters), False)
    spec = CacheSpec(folder, fingerprint, tokens, 0, SHARD_ROWS)
    built = build(spec, make or teacher, world, telemetry)
    return fingerprint, built, telemetry.metrics.registry


@torch.no_grad()
def one_by_one(model, tokens, row):
    """Logits and all hidden states of one example, from the plain model, without padding."""
    start, stop = tokens.offsets_N1[row : row + 2]
    ids = torch.from_numpy(tokens.input_ids_T[start:stop].astype(np.int64))[None].to(model.device)
    out = model(ids, output_hidden_states=True)
    return out.logits[0].cpu(), torch.stack([out.hidden_states[layer][0] for layer in LAYERS], dim=1).cpu()


@pytest.fixture(scope="module")
def built(tmp_path_factory, tokens, world, model):
    """A complete cache of `FINGERPRINT`; read-only."""
    folder = tmp_path_factory.mktemp("cache")
    assert fill(folder, tokens, world, model)[1] == EXAMPLES
    return folder


@pytest.fixture
def mine(built, tmp_path):
    """A copy of the complete cache, to damage."""
    return shutil.copytree(built, tmp_path / "cache")


def never(layers):
    raise AssertionError("the teacher must not be loaded")


def test_rows_are_found_by_id_in_any_order(built, tokens, model):
    reader = CacheReader(built, FINGERPRINT)
    assert read_manifest(built).rows == EXAMPLES
    rows = np.random.default_rng(1).permutation(EXAMPLES)
    logits, states = reader.rows_of(tokens.ids_N[rows], 24)
    assert logits.shape == (EXAMPLES, 3) and states.shape == (EXAMPLES, 2, 32)
    for i, row in enumerate(rows):
        wanted_logits, wanted_states = one_by_one(model, tokens, row)
        torch.testing.assert_close(logits[i], wanted_logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(states[i], wanted_states[0], rtol=0, atol=1e-5)
    twice = np.array([rows[3], rows[0], rows[3]])
    assert torch.equal(reader.rows_of(tokens.ids_N[twice], 24)[0], logits[[3, 0, 3]])


def test_rows_that_the_teacher_is_sure_of(built, tokens, model):
    labels = tokens.labels_N.copy()
    labels[::2] = -1
    set_ = dataclasses.replace(tokens, labels_N=labels)
    best = np.array([one_by_one(model, tokens, row)[0].double().softmax(-1).max().item() for row in range(EXAMPLES)])
    minimum = float(np.median(best)) + 1e-6
    rows = confident_rows(set_, CacheReader(built, FINGERPRINT), minimum)
    assert rows.tolist() == [row for row in range(EXAMPLES) if row % 2 or best[row] >= minimum]
    assert 0 < len(rows) < EXAMPLES
    part = set_.subset(rows)
    again = part.subset(np.arange(3, 9))
    for found, of in ((part, rows), (again, rows[3:9])):
        assert len(found) == len(of) and found.ids_N.tolist() == tokens.ids_N[of].tolist()
        assert found.lengths_N.tolist() == tokens.lengths_N[of].tolist()
        assert found.spans_of(np.arange(len(found)))[0].tolist() == tokens.spans_of(of)[0].tolist()
        here, there = np.arange(len(of))[::-1], of[::-1]
        mine, whole = (collate(t, r, np.ones(len(r)), 0) for t, r in ((found, here), (set_, there)))
        assert all(torch.equal(value, whole.tensors[name]) for name, value in mine.tensors.items())


def test_batches_have_few_sizes_and_cover_every_row(tokens, world, model):
    """Each batch size costs memory until the process ends."""
    sizes = []

    class RecordedBatches(TeacherBatches):
        def of(self, rows_B):
            sizes.append(len(rows_B))
            return super().of(rows_B)

    many = np.tile(np.arange(EXAMPLES), 7)
    teacher = LiveTeacher(model, LAYERS, "float32", "float32", False, world.device)
    logits, _ = run_teacher(many, RecordedBatches(tokens, 0, world.device), teacher)
    assert sum(sizes) == len(many) and max(sizes) > 32 and all(size % 32 == 0 for size in sizes if size > 32)
    for row in (0, EXAMPLES - 1, len(many) - 1):
        torch.testing.assert_close(logits[row], one_by_one(model, tokens, many[row])[0], rtol=0, atol=1e-5)


def test_states_of_every_token(tmp_path, tokens, world, model):
    fingerprint, _, _ = fill(tmp_path, tokens, world, model, states="tokens")
    rows = np.array([7, 50, 0, 23, 8])
    _, states = CacheReader(tmp_path, fingerprint).rows_of(tokens.ids_N[rows], 24)
    assert states.shape == (5, 24, 2, 32)
    for i, row in enumerate(rows):
        length = int(tokens.lengths_N[row])
        torch.testing.assert_close(states[i, :length], one_by_one(model, tokens, row)[1], rtol=0, atol=1e-5)
        assert not states[i, length:].any(), "padding is 0"


@pytest.mark.parametrize("states", ["cls", "tokens"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_storage_is_the_rounded_value_and_half_the_size(tmp_path, tokens, world, model, dtype, states):
    whole, _, _ = fill(tmp_path / "whole", tokens, world, model, "float32", states)
    half, _, registry = fill(tmp_path / "half", tokens, world, model, dtype, states)
    assert registry.get_sample_value("pkd_cache_rows_total") == EXAMPLES
    assert registry.get_sample_value("pkd_cache_rows_expected") == EXAMPLES
    wanted = CacheReader(tmp_path / "whole", whole).rows_of(tokens.ids_N, 24)
    got = CacheReader(tmp_path / "half", half).rows_of(tokens.ids_N, 24)
    for mine, full in zip(got, wanted, strict=True):
        assert mine.dtype == getattr(torch, dtype) and full.dtype == torch.float32
        assert torch.equal(mine, full.to(mine.dtype))
    stored, full = (map_tensors(tmp_path / name / shard_name(0))[0]["states"].nbytes for name in ("half", "whole"))
    assert 2 * stored == full


def test_the_cache_equals_the_live_teacher_bit_for_bit(tmp_path, tokens, world, model):
    """For the same batch, at the precision of a CPU run."""
    fingerprint, _, _ = fill(tmp_path, tokens, world, model, "bfloat16")
    by_id = np.argsort(tokens.ids_N)[:SHARD_ROWS]  # the first shard, which is one batch of the build
    order = by_id[np.argsort(-tokens.lengths_N[by_id], kind="stable")]
    teacher = LiveTeacher(model, LAYERS, "float32", "bfloat16", False, world.device)
    live = teacher(collate(tokens, order, np.ones(SHARD_ROWS), 0).to(world.device).inputs)
    for mine, theirs in zip(CacheReader(tmp_path, fingerprint).rows_of(tokens.ids_N[order], 24), live, strict=True):
        assert torch.equal(mine, theirs.cpu())


def test_progress_counters_continue_in_the_next_process(tmp_path, tokens, world, model):
    counters = tmp_path / "counters/node-0.json"
    for missing, written in ((), EXAMPLES), ((0, 1), EXAMPLES + 2 * SHARD_ROWS), ((), EXAMPLES + 2 * SHARD_ROWS):
        for index in missing:
            (tmp_path / "cache" / shard_name(index)).unlink()
        _, _, registry = fill(tmp_path / "cache", tokens, world, model, counters=counters)
        assert registry.get_sample_value("pkd_cache_rows_total") == written
        assert registry.get_sample_value("pkd_cache_rows_expected") == written


def test_an_interrupted_build_resumes_with_the_missing_shards(mine, tokens, world, model):
    before = {p.name: p.read_bytes() for p in mine.iterdir()}
    assert sorted(before) == ["manifest.json", *map(shard_name, range(3))]
    assert fill(mine, tokens, world, model, make=never)[1] == 0, "a complete cache does not load the teacher"
    (mine / "manifest.json").unlink()  # killed before the commit
    with pytest.raises(UserError, match="holds no complete teacher cache; run the stage `cache` first"):
        CacheReader(mine, FINGERPRINT)
    (mine / shard_name(1)).unlink()
    kept = (mine / shard_name(0)).stat().st_mtime_ns
    assert fill(mine, tokens, world, model)[1] == SHARD_ROWS
    assert {p.name: p.read_bytes() for p in mine.iterdir()} == before
    (mine / shard_name(2)).unlink()  # lost after the commit
    with pytest.raises(UserError, match=r"shard-00002\.safetensors: the shard is missing; remove"):
        CacheReader(mine, FINGERPRINT)
    assert fill(mine, tokens, world, model)[1] == EXAMPLES - 2 * SHARD_ROWS
    assert {p.name: p.read_bytes() for p in mine.iterdir()} == before
    assert (mine / shard_name(0)).stat().st_mtime_ns == kept


@pytest.mark.parametrize("states", ["cls", "tokens"])
def test_a_pass_over_several_shards_fills_each(tmp_path, tokens, world, model, states, monkeypatch):
    """As on a GPU, where the rows of several shards are sorted by length together."""
    one, _, _ = fill(tmp_path / "one", tokens, world, model, states=states)
    monkeypatch.setattr(cache_builder, "_shards_per_pass", lambda teacher, shard_rows: 2)
    fill(tmp_path / "two", tokens, world, model, states=states)
    wanted, found = (CacheReader(tmp_path / name, one).rows_of(tokens.ids_N, 24) for name in ("one", "two"))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_shards_of_another_teacher_are_rebuilt(mine, tokens, world, model):
    other = dataclasses.replace(FINGERPRINT, teacher="another")
    with pytest.raises(UserError, match="belongs to another run"):
        fill(mine, tokens, world, model, make=never, fingerprint=other)
    (mine / "manifest.json").unlink()
    assert fill(mine, tokens, world, model, fingerprint=other)[1] == EXAMPLES
    CacheReader(mine, other)
    assert read_manifest(mine).rows == EXAMPLES


@pytest.mark.parametrize("part", [field.name for field in dataclasses.fields(Fingerprint)])
def test_a_cache_of_another_run_names_the_difference(built, part):
    value = {"max_length": 64, "layers": (1, 3)}.get(part, "other")
    other = dataclasses.replace(FINGERPRINT, **{part: value})
    with pytest.raises(UserError) as error:
        CacheReader(built, other)
    cached, wanted = FINGERPRINT.as_json()[part], other.as_json()[part]
    assert f"; it differs in {part} (cache: {cached}, this run: {wanted}); set cache.dir" in str(error.value)


@pytest.mark.parametrize("states", ["cls", "tokens"])
def test_a_cache_with_more_layers_serves_runs_that_need_fewer(tmp_path, tokens, world, model, states):
    whole, _, _ = fill(tmp_path, tokens, world, model, states=states)
    wanted = CacheReader(tmp_path, whole).rows_of(tokens.ids_N[:9], 24)
    for layers, places in (((2,), [1]), ((), []), ((2, 1), [1, 0])):
        fewer = dataclasses.replace(whole, layers=layers)
        got = CacheReader(tmp_path, fewer).rows_of(tokens.ids_N[:9], 24)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1][..., places, :])
        assert fill(tmp_path, tokens, world, model, states=states, make=never, fingerprint=fewer)[1] == 0
    before = (tmp_path / shard_name(1)).read_bytes()
    (tmp_path / shard_name(1)).unlink()
    assert fill(tmp_path, tokens, world, model, states=states, fingerprint=fewer)[1] == SHARD_ROWS
    assert (tmp_path / shard_name(1)).read_bytes() == before, "rebuilt with all of its layers"


def test_an_unknown_example_is_rejected(built, tokens):
    reader = CacheReader(built, FINGERPRINT)
    known = np.sort(tokens.ids_N)
    for unknown in (-(2**63), known[0] - 1, known[30] + 1, known[-1] + 1, 2**63 - 1):
        with pytest.raises(UserError, match="lacks an example of this data set"):
            reader.rows_of(np.array([known[5], unknown], dtype=np.int64), 24)


@pytest.mark.parametrize("damage", ["altered", "short"])
def test_a_damaged_shard_is_named(mine, tokens, world, model, damage):
    path = mine / shard_name(1)
    content = path.read_bytes()
    path.write_bytes(content[:-1] if damage == "short" else content[:-1] + bytes([content[-1] ^ 1]))
    message = rf"shard-00001\.safetensors: the shard.*{'bytes, the manifest says' if damage == 'short' else 'checksum'}"
    with pytest.raises(UserError, match=message):
        CacheReader(mine, FINGERPRINT)
    with pytest.raises(UserError, match=message):
        fill(mine, tokens, world, model, make=never)
    if damage == "altered":  # a rank verifies only its own shards
        CacheReader(mine, FINGERPRINT, checksums=[0, 2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": 2}', "has format version 2, expected 1; remove the folder"),
        ('{"format_version', "cannot be read"),
        ("{}", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format_version": 1, "rows": 3}', r"cannot be read \(fingerprint: Field required\); remove the folder"),
    ],
)
def test_an_unreadable_manifest_is_rejected(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message):
        CacheReader(tmp_path, FINGERPRINT)


def test_outputs_that_overflow_the_dtype_are_rejected(tmp_path, tokens, world, model):
    weight = model.classifier.weight
    with torch.no_grad():
        before = weight.clone()
        weight *= 1e9
    try:
        with pytest.raises(UserError, match=r"not finite at this precision; set cache\.precision and cache\.dtype"):
            fill(tmp_path, tokens, world, model, "float16")
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert not list(tmp_path.iterdir()), "no partial file is left"


def resident_bytes():
    """Return the resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_reading_does_not_load_the_file(tmp_path):
    rows = 4096
    states = torch.zeros(rows, 4, 2048)
    states[:, 0, 0] = torch.arange(rows)
    tensors = {"ids": 3 * torch.arange(rows), "logits": torch.zeros(rows, 2), "states": states}
    save_file(tensors, tmp_path / shard_name(0))
    size = (tmp_path / shard_name(0)).stat().st_size
    assert size > 1 << 27
    entry = ShardEntry(shard_name(0), rows, size, "", first_id=0, last_id=3 * rows - 3)
    Manifest(FINGERPRINT, rows, rows, {}, (entry,)).write(tmp_path)
    del tensors, states
    before = resident_bytes()
    reader = CacheReader(tmp_path, FINGERPRINT, checksums=[])
    arrays, _ = reader._shards[0]
    assert not any(array.flags.owndata for array in arrays.values())
    wanted = np.array([4000, 1, 2222, 17])
    _, found = reader.rows_of(3 * wanted, 1)
    assert found[:, 0, 0].tolist() == wanted.tolist()
    assert resident_bytes() - before < size // 8


@pytest.mark.parametrize("damage", ["altered", "short", "empty"])
def test_a_shard_damaged_before_the_commit_is_rebuilt(tmp_path, tokens, world, model, damage):
    fill(tmp_path, tokens, world, model)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "manifest.json").unlink()
    path = tmp_path / shard_name(1)
    content = before[path.name]
    changed = {
        "altered": content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
        "short": content[: len(content) // 2],
        "empty": b"",
    }
    path.write_bytes(changed[damage])
    assert fill(tmp_path, tokens, world, model)[1] == SHARD_ROWS
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_many_shards_need_no_open_files(tmp_path, tokens, world, model):
    """A large cache has more shards than a process may have open files."""
    fingerprint, _, _ = fill(tmp_path, tokens, world, model)
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = CacheReader(tmp_path, fingerprint)
    assert len(reader._shards) == 3 and len(list(Path("/proc/self/fd").iterdir())) == before
