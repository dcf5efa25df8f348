"""Memory between ranks, where there is none to be had; tests/dist has it in use."""

from pkd_dist.distributed import shared_memory as shared


def test_without_room_there_is_none_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "FOLDER", str(tmp_path))
    assert shared._make(1 << 60) is None
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shared, "FOLDER", str(tmp_path / "nowhere"))
    assert shared._make(1) is None
