"""Checkpoints: complete or absent; the newest intact one of the same run; readable whatever ranks wrote them."""

import json
import shutil

import pytest
import torch

from pkd_dist.distributed.ranks import Ranks
from pkd_dist.distributed.world import World
from pkd_dist.errors import UserError
from pkd_dist.files import sha256
from pkd_dist.training import checkpoint
from pkd_dist.training.checkpoint import WEIGHT, Shards, Slice, best_name, committed, find, save, step_name


@pytest.fixture(scope="module")
def world():
    one = World(Ranks(0, 0, 1, 1, "python"), 60)
    yield one
    one.close()


def write(world, folder, step, best=None, keep=2, fingerprint="mine", branch=None):
    """Save a checkpoint as training does: new best weights are written before it."""
    folder.mkdir(exist_ok=True)
    if best is not None and not (folder / best_name(best)).exists():
        (folder / best_name(best)).write_bytes(b"best %d" % best)
    file = None if best is None else best_name(best)
    state = {"fingerprint": fingerprint, "step": step, "best_file": file, "best_sha256": file and sha256(folder / file)}
    slices = [Slice(WEIGHT, "w", 0, torch.full((250,), float(step)), (10, 25))]
    return save(world, folder, step, slices, state, keep, branch)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def look(world, folder, fingerprint="mine"):
    """Return what a resume finds (the step, or None) and what it reports."""
    said = []
    found = find(world, folder, fingerprint, said.append)
    if found:
        assert found.path == folder / step_name(found.state["step"])
    return found and found.state["step"], said


def test_a_saved_checkpoint_is_found(tmp_path, world):
    folder = tmp_path / "checkpoints"
    assert look(world, folder) == (None, [])
    size = write(world, folder, 5)
    path = folder / "step-00000005"
    assert names(path) == ["commit.json", "rank-0000.safetensors", "state.json"]
    marker = json.loads((path / "commit.json").read_text())
    assert sorted(marker["files"]) == ["rank-0000.safetensors", "state.json"]
    assert size == sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and p.name != "commit.json")
    last = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
    assert last.name == "commit.json", "the marker is written last"
    assert look(world, folder) == (5, [])
    write(world, folder, 10)
    assert look(world, folder) == (10, []), "the newest"


def test_a_folder_without_its_marker_does_not_exist(tmp_path, world):
    write(world, tmp_path, 5)
    write(world, tmp_path, 10)
    (tmp_path / "step-00000010/commit.json").unlink()  # killed just before the commit
    (tmp_path / ".step-00000015.tmp").mkdir()  # killed in the middle of a save
    assert committed(tmp_path) == [tmp_path / "step-00000005"]
    assert look(world, tmp_path) == (5, []), "nothing is wrong, so nothing is reported"
    write(world, tmp_path, 10)
    assert names(tmp_path) == ["step-00000005", "step-00000010"], "saved again, and leftovers are removed"
    assert look(world, tmp_path) == (10, [])


def test_a_second_save_of_a_step_never_leaves_none(tmp_path, world, monkeypatch):
    """After a stop in an evaluation: a kill between the two renames leaves the step's earlier checkpoint."""
    write(world, tmp_path, 5)
    final, happened = tmp_path / step_name(5), []

    def killed(source, target):
        if target == final:
            happened.append(sorted(p.name for p in tmp_path.iterdir()))
            raise KeyboardInterrupt
        rename(source, target)

    rename = checkpoint.os.replace
    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(world, tmp_path, 5)
    monkeypatch.undo()
    assert happened == [[".step-00000005.tmp", "step-00000005.earlier"]]
    found = find(world, tmp_path, "mine", print)
    assert found.path.name == "step-00000005.earlier" and found.state["step"] == 5
    write(world, tmp_path, 5)
    write(world, tmp_path, 6)
    write(world, tmp_path, 7)
    assert names(tmp_path) == [step_name(6), step_name(7)]


def test_a_damaged_checkpoint_is_not_kept_in_place_of_an_intact_one(tmp_path, world):
    write(world, tmp_path, 5)
    write(world, tmp_path, 10)
    shorten(tmp_path / "step-00000010/state.json")
    assert look(world, tmp_path)[0] == 5
    write(world, tmp_path, 7)
    assert names(tmp_path) == [step_name(5), step_name(7)]


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, world):
    write(world, tmp_path, 5)
    huge = Slice(WEIGHT, "w", 0, torch.empty(1 << 48, dtype=torch.uint8, device="meta"), (1 << 48,))
    with pytest.raises(
        UserError, match=r"no space left for the checkpoint of step 10: it needs 281,474,976,710,656 bytes, [\d,]+ are"
    ):
        save(world, tmp_path, 10, [huge], {"fingerprint": "mine", "best_file": None, "best_sha256": None}, 2)
    assert names(tmp_path) == [step_name(5)] and look(world, tmp_path) == (5, [])


@pytest.mark.parametrize("keep", [2, 3])
def test_retention_keeps_the_newest_and_the_best_they_refer_to(tmp_path, world, keep):
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3), (5, 3), (6, 3)):
        write(world, tmp_path, step, best, keep)
        assert len(committed(tmp_path)) == min(step, keep)
        for path in committed(tmp_path):
            assert (tmp_path / checkpoint.read_state(path)["best_file"]).exists(), (
                "best weights that are referred to are kept"
            )
    assert names(tmp_path) == [best_name(3), *[step_name(step) for step in range(7 - keep, 7)]]


def test_best_weights_that_only_an_older_checkpoint_refers_to_are_kept(tmp_path, world):
    write(world, tmp_path, 1, best=1)
    write(world, tmp_path, 2, best=2)
    assert {best_name(1), best_name(2)} <= set(names(tmp_path)), "a resume may fall back to step 1"
    write(world, tmp_path, 3, best=2)
    assert best_name(1) not in names(tmp_path)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


@pytest.mark.parametrize("name", ["rank-0000.safetensors", "state.json"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shorten, r"has \d+ bytes, not \d+"),
        (flip, r"was altered \(its checksum is wrong\)"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["short", "altered", "missing"],
)
def test_any_damaged_file_makes_a_resume_fall_back(tmp_path, world, name, damage, words):
    write(world, tmp_path, 5)
    write(world, tmp_path, 10)
    damage(tmp_path / "step-00000010" / name)
    step, [said] = look(world, tmp_path)
    assert step == 5
    assert said.startswith(f"resuming from step-00000005: {tmp_path}/step-00000010/{name} ")
    damage(tmp_path / "step-00000005" / name)
    with pytest.raises(
        UserError, match=rf"{name} {words}; no intact checkpoint is left in .*; restore one, or use --fr"
    ):
        look(world, tmp_path)


@pytest.mark.parametrize(("damage", "words"), [(lambda p: p.unlink(), "is missing"), (flip, "was altered")])
@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ([(5, 5), (10, 10)], 10),  # (step, step of its best weights): it holds the damaged weights itself
        ([(5, 5), (7, 6), (8, 6)], 5),
        ([(6, 6), (7, 6), (8, 6)], 6),
        ([(7, 6), (8, 6)], 8),
    ],
)
def test_damaged_best_weights_cost_as_few_steps_as_possible(tmp_path, world, damage, words, saved, resumed):
    for step, best in saved:
        write(world, tmp_path, step, best, keep=3)
    damaged = tmp_path / best_name(saved[-1][1])
    damage(damaged)
    step, [said] = look(world, tmp_path)
    assert step == resumed and said.startswith(f"resuming from {step_name(step)}: {damaged} {words}")
    assert find(world, tmp_path, "mine", print).path.name == step_name(step), "again the same"


@pytest.mark.parametrize("state", [b"", b"\xff", b"[]", b"{}", b'{"best_file": ["a"]}'])
def test_an_older_checkpoint_that_is_damaged_hinders_nothing(tmp_path, world, state):
    write(world, tmp_path, 5, best=5)
    write(world, tmp_path, 10, best=10)
    (tmp_path / step_name(5) / "state.json").write_bytes(state)
    assert look(world, tmp_path) == (10, [])
    checkpoint.retain_best(tmp_path, best_name(12))
    assert best_name(10) in names(tmp_path)
    write(world, tmp_path, 12, best=12)
    assert look(world, tmp_path) == (12, [])


@pytest.mark.parametrize(
    "marker",
    [b"", b"\xff", b"[]", b'{"files": {}}', b'{"step": 1, "world_size": 1, "fingerprint": "mine", "files": {}}'],
)
def test_a_damaged_marker_makes_a_resume_fall_back(tmp_path, world, marker):
    write(world, tmp_path, 5)
    write(world, tmp_path, 10)
    (tmp_path / step_name(10) / "commit.json").write_bytes(marker)
    assert look(world, tmp_path)[0] == 5


def test_a_changed_fingerprint_in_a_marker_is_damage(tmp_path, world):
    write(world, tmp_path, 5)
    write(world, tmp_path, 10)
    marker = tmp_path / step_name(10) / "commit.json"
    marker.write_text(marker.read_text().replace("mine", "mint"))
    assert look(world, tmp_path)[0] == 5


@pytest.mark.parametrize("when", ["both renamed", "first renamed", "one damaged"])
def test_a_kill_around_the_renames_of_a_second_save(tmp_path, world, when):
    write(world, tmp_path, 5)
    final, earlier = tmp_path / step_name(5), tmp_path / f"{step_name(5)}.earlier"
    if when == "first renamed":
        final.rename(earlier)
    else:
        shutil.copytree(final, earlier)
    if when == "one damaged":
        shorten(final / "state.json")
    found = find(world, tmp_path, "mine", lambda text: None)
    assert found.path == (final if when == "both renamed" else earlier)
    write(world, tmp_path, 5)
    assert names(tmp_path) == [step_name(5)] and look(world, tmp_path) == (5, [])


def test_a_torn_marker_makes_a_resume_fall_back(tmp_path, world):
    write(world, tmp_path, 5)
    write(world, tmp_path, 10)
    marker = tmp_path / "step-00000010/commit.json"
    marker.write_text(marker.read_text()[:50])
    assert look(world, tmp_path) == (
        5,
        [f"resuming from step-00000005: {tmp_path / 'step-00000010/commit.json'} cannot be read"],
    )


def test_another_run_is_rejected(tmp_path, world):
    write(world, tmp_path, 5)
    with pytest.raises(
        UserError, match=r"step-00000005: belongs to a run with other settings; use --fresh, or another"
    ):
        look(world, tmp_path, "another")


def test_slices_of_several_ranks_become_one_tensor(tmp_path):
    """Three ranks wrote 10 elements: 0-3, 4-8 and 9."""
    whole = torch.arange(10.0)
    for rank, (start, stop) in enumerate([(4, 9), (0, 4), (9, 10)]):
        values = {f"{WEIGHT}/w": whole[start:stop].clone()} | ({f"{WEIGHT}/b": torch.ones(1)} if rank == 1 else {})
        places = {f"{WEIGHT}/w": [start, [5, 2]]} | ({f"{WEIGHT}/b": [0, []]} if rank == 1 else {})
        checkpoint.save_file(values, tmp_path / f"rank-{rank:04d}.safetensors", metadata={"places": json.dumps(places)})
    shards = Shards(tmp_path)
    assert sorted(shards.names()) == ["b", "w"] and f"{WEIGHT}/w" in shards and "exp_avg/w" not in shards
    assert torch.equal(shards.tensor(WEIGHT, "w"), whole.view(5, 2)) and shards.tensor(WEIGHT, "b").shape == ()
    for start in range(11):
        for count in range(11 - start):
            assert torch.equal(shards.read(WEIGHT, "w", start, count), whole[start : start + count])
    (tmp_path / "rank-0000.safetensors").unlink()
    with pytest.raises(AssertionError, match="5 of 10 elements"):
        Shards(tmp_path).tensor(WEIGHT, "w")


def test_a_longer_training_continues_from_the_checkpoint_kept_for_it(tmp_path, world):
    folder = tmp_path / "checkpoints"
    for step, best in ((5, 5), (10, 10), (15, 15), (20, 15), (25, 15)):
        write(world, folder, step, best, branch=10)
    kept = ["best-00000010.safetensors", "best-00000015.safetensors"]
    assert names(folder) == kept + [step_name(step) for step in (10, 20, 25)]
    found = find(world, folder, "mine", pytest.fail, lambda state: state["step"] <= 10)
    assert found and found.path.name == step_name(10) and found.best_damage is None
    assert committed(folder) == [found.path], "the others are given up"
    write(world, folder, 12, 10, branch=30)
    assert names(folder) == ["best-00000010.safetensors", step_name(10), step_name(12)]
    assert find(world, folder, "mine", pytest.fail, lambda state: False) is None
    assert committed(folder) == []
