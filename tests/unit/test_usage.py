"""Usage errors and bad options of `pkd`: one line that names the option, and status 2."""

import pytest
from typer.testing import CliRunner

from pkd_dist.cli.main import app

CASES = [
    ("evaluate --modle x", "pkd: no such option: --modle; did you mean --model? See pkd evaluate --help"),
    ("config check", "pkd: FILE: is missing; see pkd config check --help"),
    ("config check .", "pkd: .: is a folder; give a YAML file"),
    ("nope", "pkd: no such command 'nope'; see pkd --help"),
    ("serve a --port x", "pkd: --port: 'x' is invalid; allowed: integer; see pkd serve --help"),
    ("serve a --format tf", "pkd: --format: 'tf' is unknown; allowed: onnx"),
    ("export", "pkd: give --config FILE, --from-checkpoint"),
    ("export --output x", "pkd: --from-checkpoint: is missing; --output is used only with it"),
    ("export --config x --formats tf", "pkd: --formats: 'tf' is unknown; allowed: safetensors"),
    ("export verify nowhere", "pkd: no such folder: nowhere; give a folder that `pkd export` wrote"),
    ("metrics targets nowhere", "pkd: DIR: no such folder: nowhere"),
    ("evaluate --model x --batch-size 0", "pkd: --batch-size: 0 is invalid; allowed: integer >= 1"),
    ("evaluate --model x --task rte", "pkd: --data: is missing"),
    ("prepare --data nowhere", "pkd: --data: no such folder: nowhere"),
    ("prepare --data hub:", "pkd: --data: 'hub:' is not of the form hub:NAME"),
    (
        "prepare --data x --kind foo",
        "pkd: --kind: 'foo' is invalid; allowed: classification or regression or multilabel or multiple_choice or null",
    ),
    ("prepare --data x --task ticket", "pkd: --task: unknown task 'ticket'; allowed: cola"),
]


@pytest.mark.parametrize(("line", "message"), CASES, ids=[line for line, _ in CASES])
def test_bad_options_are_one_line_and_status_2(line, message):
    done = CliRunner().invoke(app, line.split())
    said = [text for text in done.stderr.splitlines() if not text.startswith("pkd: no --data")]
    assert done.exit_code == 2 and len(said) == 1 and said[0].startswith(message), done.stderr
