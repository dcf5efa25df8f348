"""Atomic writes, and a full disk: a real one of 64 KiB, so this needs root."""

import os
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from pkd_dist.errors import UserError
from pkd_dist.files import require_space, require_unaltered, sha256, write_atomically, write_json


@pytest.fixture
def small(tmp_path):
    if os.geteuid():
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


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
