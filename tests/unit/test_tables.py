"""Tables of the command line."""

import io

from pkd_dist.telemetry.markup import console, table

NAME, FIGURES = "a-method-with-a-long-name-without-dropout", ["83.52 ± 1.23"] * 6


def printed():
    shown = table("method", *(f"the score on part {n}" for n in range(6)))
    shown.add_row(NAME, *FIGURES)
    file = io.StringIO()
    console(file).print(shown)
    return file.getvalue().splitlines()


def test_a_file_has_each_row_in_one_line(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert printed()[-1].split() == [NAME, *" ".join(FIGURES).split()]


def test_a_narrow_terminal_has_whole_names(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert any(line.startswith(f"{NAME} ") for line in printed()) and max(map(len, printed())) <= 80
