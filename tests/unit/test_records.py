"""metrics.jsonl: append-only, without gaps, duplicates or torn lines after a kill."""

import json

import pytest

from pkd_dist.errors import UserError
from pkd_dist.telemetry.records import Records, cut_after, losses, read


def lines(*steps):
    return "".join(json.dumps({"step": step, "loss": step / 4}) + "\n" for step in steps).encode()


def test_records_are_flushed_and_read_back(tmp_path):
    path = tmp_path / "new/metrics.jsonl"
    assert list(read(path)) == []
    records = Records(path)
    for step in (1, 2):
        records.write({"step": step, "loss": 0.1 * step})
        assert [r["step"] for r in read(path)][-1] == step, "before close"
    records.close()
    assert list(read(path)) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"{", b'{"step": 3, "loss": 0.75}'])
def test_a_torn_last_line_is_cut_and_written_again(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1, 2) + torn)
    assert [r["step"] for r in read(path)] == [1, 2], "a reader sees complete lines only"
    records = Records(path)
    records.write({"step": 3, "loss": 0.75})
    records.close()
    assert path.read_bytes() == lines(1, 2, 3)


def test_a_file_of_one_torn_line_becomes_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1')
    Records(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("lost", [bytes(70000), bytes(30) + b'": 1}\n' + lines(4), b'{"st' + bytes(9) + b"\n"])
def test_blocks_that_a_power_loss_left_empty_are_cut(tmp_path, lost):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1, 2) + lost)
    records = Records(path)
    records.write({"step": 3, "loss": 0.75})
    records.close()
    assert path.read_bytes() == lines(1, 2, 3)


def test_repeated_steps_are_not_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Records(path)
    for record in ({"step": 1}, {"step": 2}, {"step": 2, "split": "dev"}, {"step": 3}):
        first.write(record)
    first.close()
    before = path.read_bytes()
    second = Records(path)  # resumed from step 1
    for record in (
        {"step": 2},
        {"step": 2, "split": "dev"},
        {"step": 3},
        {"step": 3},
        {"step": 3, "split": "dev"},
        {"step": 4},
    ):
        second.write(record | {"again": True})
    second.close()
    after = path.read_bytes()
    assert after.startswith(before), "existing lines are unchanged"
    assert after[len(before) :].decode().splitlines() == [
        '{"step": 3, "split": "dev", "again": true}',
        '{"step": 4, "again": true}',
    ]


@pytest.mark.parametrize(
    "line",
    [
        "words",
        "{}",
        "[1]",
        '{"step": 2, "loss": "x"}',
        "[" * 100_000,
        '{"step": 2, "loss_c\xe5": 1}',
        '{"step": 2, "seconds": {"step": "x"}}',
        '{"step": 2, "seconds": 1}',
        '{"step": 2, "split": 1}',
    ],
)
def test_invalid_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1) + f"{line}\n".encode())
    with pytest.raises(UserError) as rejected:
        list(read(path))
    assert str(rejected.value).startswith(f"{path}, line 2: is not a record")


def test_losses_by_term():
    record = {"step": 1, "loss": 3.0, "loss_ce": 1.0, "loss_pt": 2.0, "loss_scale": 128.0, "learning_rate": 0.1}
    assert losses(record) == {"total": 3.0, "ce": 1.0, "pt": 2.0}


def test_records_after_a_step_can_be_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_after(path, 2)
    assert not path.exists()
    path.write_bytes(lines(1, 2, 3) + b'{"step": 3, "split": "dev", "main_metric": 0.5}\n' + b'{"step": 4, "lo')
    cut_after(path, 2)
    assert path.read_bytes() == lines(1, 2)
    records = Records(path)
    assert records.write({"step": 3, "loss": 0.75}), "it counts as new"
    records.close()
