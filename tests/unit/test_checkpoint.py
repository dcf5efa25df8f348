"""Checkpoints: whole or absent, the newest intact one, never another run's."""

import json
import random

import numpy as np
import pytest
import torch

from pkd_dist import checkpoint
from pkd_dist.checkpoint import best_name, committed, find, load_random_state, save, step_name
from pkd_dist.dist import World
from pkd_dist.errors import UserError
from pkd_dist.ranks import Ranks


@pytest.fixture(scope="module")
def world():
    one = World(Ranks(0, 0, 1, 1, "python"), 60)
    yield one
    one.close()


def write(world, folder, step, best=None, keep=2, fingerprint="mine"):
    """Saves a checkpoint as training does; its best weights, where they are new, stand before it."""

    def shards(folder, tag):
        (folder / tag / "deep").mkdir()
        (folder / tag / "weights.pt").write_bytes(bytes([step]) * 1000)
        (folder / tag / "deep/optimizer.pt").write_bytes(bytes([step]) * 500)

    folder.mkdir(exist_ok=True)
    if best is not None and not (folder / best_name(best)).exists():
        (folder / best_name(best)).write_bytes(b"best")
    state = {"fingerprint": fingerprint, "step": step, "best_file": None if best is None else best_name(best)}
    return save(world, folder, step, shards, state, keep)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def look(world, folder, fingerprint="mine"):
    """What a resume finds (the step, or None), and what it says."""
    said = []
    found = find(world, folder, fingerprint, said.append)
    if found:
        assert found[0] == folder / step_name(found[1]["step"])
    return found and found[1]["step"], said


def test_what_is_saved_is_found(tmp_path, world):
    folder = tmp_path / "checkpoints"
    assert look(world, folder) == (None, [])
    size = write(world, folder, 5)
    path = folder / "step-00000005"
    assert names(path) == ["commit.json", "deep", "rank-0000.pt", "state.json", "weights.pt"]
    marker = json.loads((path / "commit.json").read_text())
    assert sorted(marker["files"]) == ["deep/optimizer.pt", "rank-0000.pt", "state.json", "weights.pt"]
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
    assert look(world, tmp_path) == (5, []), "nothing is wrong, so nothing is said"
    write(world, tmp_path, 10)
    assert names(tmp_path) == ["step-00000005", "step-00000010"], "done again; what was left over is gone"
    assert look(world, tmp_path) == (10, [])


def test_a_save_that_fails_leaves_the_earlier_ones(tmp_path, world):
    write(world, tmp_path, 5)

    def full_disk(folder, tag):
        (folder / tag / "weights.pt").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save(world, tmp_path, 10, full_disk, {"fingerprint": "mine", "best_file": None}, 2)
    assert look(world, tmp_path) == (5, [])


@pytest.mark.parametrize("keep", [2, 3])
def test_retention_keeps_the_newest_and_the_best_they_refer_to(tmp_path, world, keep):
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3), (5, 3), (6, 3)):
        write(world, tmp_path, step, best, keep)
        assert len(committed(tmp_path)) == min(step, keep)
        for path in committed(tmp_path):
            assert (tmp_path / checkpoint.read_state(path)["best_file"]).exists(), "never a best that is referred to"
    assert names(tmp_path) == [best_name(3), *[step_name(step) for step in range(7 - keep, 7)]]


def test_a_best_that_only_an_older_checkpoint_refers_to_stays(tmp_path, world):
    write(world, tmp_path, 1, best=1)
    write(world, tmp_path, 2, best=2)
    assert {best_name(1), best_name(2)} <= set(names(tmp_path)), "a resume may go back to step 1"
    write(world, tmp_path, 3, best=2)
    assert best_name(1) not in names(tmp_path)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


@pytest.mark.parametrize("name", ["weights.pt", "deep/optimizer.pt", "rank-0000.pt", "state.json"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shorten, r"has \d+ bytes, not \d+"),
        (flip, r"was altered \(its checksum is wrong\)"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["short", "altered", "missing"],
)
def test_any_damaged_file_sends_back_to_the_one_before(tmp_path, world, name, damage, words):
    write(world, tmp_path, 5)
    write(world, tmp_path, 10)
    damage(tmp_path / "step-00000010" / name)
    step, [said] = look(world, tmp_path)
    assert step == 5
    assert said.startswith(f"going on from step-00000005: {tmp_path}/step-00000010/{name} ")
    damage(tmp_path / "step-00000005" / name)
    with pytest.raises(
        UserError, match=rf"{name} {words}; no intact checkpoint is left in .*; restore one, or use --fr"
    ):
        look(world, tmp_path)


def test_best_weights_that_are_gone_send_back_too(tmp_path, world):
    write(world, tmp_path, 5, best=5)
    write(world, tmp_path, 10, best=10)
    (tmp_path / best_name(10)).unlink()
    assert look(world, tmp_path) == (5, [f"going on from step-00000005: {tmp_path / best_name(10)} is missing"])


def test_a_torn_marker_sends_back_too(tmp_path, world):
    write(world, tmp_path, 5)
    write(world, tmp_path, 10)
    marker = tmp_path / "step-00000010/commit.json"
    marker.write_text(marker.read_text()[:50])
    assert look(world, tmp_path) == (
        5,
        [f"going on from step-00000005: {tmp_path / 'step-00000010/commit.json'} cannot be read"],
    )


def test_another_run_or_world_is_refused(tmp_path, world):
    write(world, tmp_path, 5)
    with pytest.raises(
        UserError, match=r"step-00000005: belongs to a run with other settings or another ZeRO stage; use"
    ):
        look(world, tmp_path, "another")
    marker = tmp_path / "step-00000005/commit.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"world_size": 4}))
    with pytest.raises(UserError, match=r"written by 4 rank\(s\), this is a run of 1; continue with 4, or use --fresh"):
        look(world, tmp_path)


def draw():
    return random.random(), np.random.random(3).tolist(), torch.rand(3).tolist(), torch.randn(3).tolist()


def test_random_state_is_restored_bit_for_bit(tmp_path, world):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draw(), random.gauss(0, 1), np.random.normal()  # a generator in the middle of a pair of normals
    write(world, tmp_path, 5)
    wanted = draw(), random.gauss(0, 1), np.random.normal()
    random.seed(7), np.random.seed(8), torch.manual_seed(9)
    assert draw() != wanted[0]
    load_random_state(tmp_path / "step-00000005", 0)
    assert (draw(), random.gauss(0, 1), np.random.normal()) == wanted
