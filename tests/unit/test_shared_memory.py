"""Shared memory between ranks when none is available; tests/dist uses it."""

from pkd_dist.distributed import shared_memory as shared


def test_without_space_there_is_none_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "FOLDER", str(tmp_path))
    assert shared._allocate(1 << 60) is None
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shared, "FOLDER", str(tmp_path / "nowhere"))
    assert shared._allocate(1) is None
