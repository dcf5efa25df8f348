"""Durable writes, in each state that a power loss may leave; and a full disk: a real one of 64 KiB, so this needs root."""

import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.faults.recorder import VARIANTS, Recorder, read, rebuild
from pkd_dist.errors import UserError
from pkd_dist.files import (
    folder_written_atomically,
    make_folder,
    move,
    require_space,
    require_unaltered,
    sha256,
    write_atomically,
    write_json,
)


@pytest.fixture
def small(tmp_path):
    if os.geteuid():
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_moves_to_another_file_system_is_copied(small, tmp_path, kind):
    source, target = tmp_path / "source", small / "target"
    if kind == "folder":
        source.mkdir()
    inner = source / "inner" if kind == "folder" else source
    inner.write_text("content")
    move(source, target)
    assert (target / "inner" if kind == "folder" else target).read_text() == "content"
    assert not source.exists() and [path.name for path in small.iterdir()] == ["target"]


def save_tensors(path):
    save_file({"w": torch.zeros(1 << 16)}, path)


@pytest.mark.parametrize(
    "write", [lambda path: path.write_bytes(bytes(1 << 18)), save_tensors], ids=["python", "safetensors"]
)
@pytest.mark.parametrize(
    ("needed", "said"), [(1 << 18, r"it needs 262,144 bytes, [\d,]+ are"), (0, r"[\d,]+ bytes are")]
)
def test_a_full_disk_leaves_the_file_that_was_there(small, write, needed, said):
    path = small / "weights"
    write_atomically(path, lambda tmp: tmp.write_bytes(b"before"))
    with pytest.raises(
        UserError, match=rf"{small}: no space left for weights: {said} free; free some space and rerun the same command"
    ):
        write_atomically(path, write, needed)
    assert path.read_bytes() == b"before" and [p.name for p in small.iterdir()] == ["weights"]


def test_a_disk_that_fills_up_is_reported(small):
    (small / "others").write_bytes(bytes(60 << 10))
    with pytest.raises(UserError, match=r"no space left for marker.json: it needs 20,\d+ bytes, 4,096 are free"):
        write_json(small / "marker.json", "x" * 20000)
    with pytest.raises(ValueError, match="another"), require_space(small, 0, "it"):
        raise ValueError("another error passes unchanged")


def test_an_altered_file_is_named(tmp_path):
    (tmp_path / "a").write_text("one")
    digest = sha256(tmp_path / "a")
    require_unaltered(tmp_path / "a", digest)
    (tmp_path / "a").write_text("two")
    with pytest.raises(UserError, match=r"/a: was altered since it was written; rerun the same command to rebuild it"):
        require_unaltered(tmp_path / "a", digest)


def write_model(folder):
    """As libraries do: files in their own modes, some through temporary files, folders within."""
    (folder / "onnx").mkdir(mode=0o700)
    save_file({"w": torch.ones(4)}, folder / "model.safetensors")
    (folder / "onnx/model.onnx").write_bytes(b"graph")
    (folder / "config.json").write_text("{}")


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_run(run):
    """A folder, a marker that vouches for it, the same again, and a move aside."""
    make_folder(run / "stages")
    with folder_written_atomically(run / "model") as temporary:
        write_model(temporary)
    write_json(run / "stages/model.json", "first")
    make_folder(run / "previous/1")
    move(run / "model", run / "previous/1/model")
    write_json(run / "stages/model.json", "started")
    with folder_written_atomically(run / "model") as temporary:
        write_model(temporary)
        (temporary / "config.json").write_text("second")
    write_json(run / "stages/model.json", "second")
    write_atomically(run / "model/README.md", lambda path: path.write_text("card"))
    write_json(run / "stages/card.json", "done")


def test_no_power_loss_leaves_a_marker_without_what_it_vouches_for(tmp_path):
    disk, store = tmp_path / "disk", tmp_path / "store"
    disk.mkdir()
    store.mkdir()
    recorder = Recorder(disk, store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", recorder.fsync)
        for name in ("replace", "unlink", "rmdir", "mkdir"):
            real = getattr(os, name)

            def noticed(*args, real=real, name=name, **more):
                recorder.cut(name, args[0])
                return real(*args, **more)

            patch.setattr(os, name, noticed)
        write_run(disk / "run")
        recorder.cut("end", disk)
    cuts = read(store)
    assert len(cuts) > 30
    seen = set()
    for number, cut in enumerate(cuts):
        for variant in VARIANTS:
            left = tmp_path / f"{number}-{variant}"
            left.mkdir()
            rebuild(cut, variant, store, left)
            seen.add(vouched(left / "run"))
    assert seen == {None, "first", "started", "second", "card"}


def vouched(run):
    """Check that what the markers of a run folder vouch for is complete, and return the last of them."""
    marker, card = run / "stages/model.json", run / "stages/card.json"
    if not marker.exists():
        return None
    said = json.loads(marker.read_text())
    if (run / "model").exists():
        assert {"config.json", "model.safetensors", "onnx/model.onnx"} <= content(run / "model").keys()
        assert said != "first" or (run / "model/config.json").read_text() == "{}"
        assert said == "first" or (run / "model/config.json").read_text() == "second", "not what was moved away"
    else:
        assert said == "started" or (run / "previous/1/model/config.json").read_text() == "{}"
    if not card.exists():
        return said
    assert said == "second" and (run / "model/README.md").read_text() == "card"
    return "card"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with folder_written_atomically(tmp_path / "model") as temporary:
            write_model(temporary)
        write_atomically(tmp_path / "shard", lambda path: save_file({"w": torch.ones(4)}, path))
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
