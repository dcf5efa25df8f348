"""Text on disk: it reads back unchanged, and no file is left."""

import errno
import os
import tempfile

import pytest

from pkd_dist.data import columns
from pkd_dist.data.columns import TextColumn
from pkd_dist.errors import UserError

TEXTS = ["one", "", "zwei\nZeilen\r\n", "\ufeffдва", "half \ud83d", "\x1f\t", *(f"text {i}" for i in range(20))]


@pytest.fixture(autouse=True)
def scratch(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(columns, "_CHUNK_TEXTS", 4)
    return tmp_path


def test_texts_come_back_as_they_were():
    column = TextColumn(iter(TEXTS))
    assert len(column) == len(TEXTS) and list(column) == TEXTS
    assert [column[i] for i in range(-len(TEXTS), len(TEXTS))] == TEXTS * 2
    for part in (
        slice(None),
        slice(3, 9),
        slice(4, 8),
        slice(-3, None),
        slice(5, 2),
        slice(20, 99),
        slice(None, None, -3),
    ):
        assert column[part] == TEXTS[part]
    assert list(zip(column, column, strict=True)) == list(zip(TEXTS, TEXTS, strict=True)), "two readers at once"
    for index in (len(TEXTS), -len(TEXTS) - 1):
        with pytest.raises(IndexError):
            column[index]
    assert not len(TextColumn()) and list(TextColumn()) == []


def test_a_column_grows_after_it_was_read():
    column = TextColumn(TEXTS[:5])
    assert list(column) == TEXTS[:5]
    column.extend(TEXTS[5:])
    assert list(column) == TEXTS


def test_equal_to_any_sequence_of_the_same_texts():
    column = TextColumn(TEXTS)
    assert column == TEXTS == column and column == TextColumn(TEXTS) and (column,) == (TEXTS,)
    assert column != TEXTS[:-1] and column != [*TEXTS[:-1], "other"] and column != 3
    assert TextColumn("ab") != "ab", "a string is not a column"


def test_no_file_is_left(scratch):
    column = TextColumn(TEXTS)
    descriptor = column._descriptor
    assert list(scratch.iterdir()) == [] and os.fstat(descriptor).st_size > 0
    del column
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_no_folder_for_temporary_files(scratch, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(scratch / "none"))
    with pytest.raises(UserError, match=r"^no usable folder for temporary files \(No such file .*set TMPDIR to one$"):
        TextColumn()


def test_a_full_disk_is_reported_with_its_folder(scratch, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    column = TextColumn()
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=rf"^{scratch}: no space left for the text of the data"):
        column.extend(TEXTS)
