"""One file as data: split the same way on one rank and on two, written into the run folder, and refused before anything is."""

import csv
import json
import random
import re
import shutil

import pytest
from conftest import launch, pkd, results, sentences, write_config
from run_folders import rewrite

from pkd_dist.files import file_digests

COLUMNS = ("id", "sentence", "label", "customer_id")
OWN = ["--task", "custom", "--text", "sentence", "--label", "label"]
GROUPED = {"dev": 0.1, "test": 0.1, "seed": 1, "stratify": True, "group": "customer_id"}


def tickets():
    """600 rows of 90 customers; 60 have the text of another one, 20 of these with the other label."""
    rng = random.Random(7)
    rows = [[text, label] for text, label in sentences(540, 3)]
    for i in range(60):
        text, label = rows[rng.randrange(540)]
        rows.append([text, 1 - label if i < 20 else label])
    table = [[i, text, label, f"customer {rng.randrange(90)}"] for i, (text, label) in enumerate(rows)]
    rng.shuffle(table)
    return table


def write_table(path, rows):
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return str(path)


def parts(run):
    """part -> rows of the table, as the run wrote them."""
    names = ("train", "dev", "test")
    paths = {name: run / f"data/parts/{name}.jsonl" for name in names}
    return {
        name: [json.loads(line) for line in path.read_text().splitlines()]
        for name, path in paths.items()
        if path.exists()
    }


def sets(run):
    return json.loads((run / "stages/data.json").read_text())["outputs"]["sets"]


@pytest.fixture
def one_file(settings, tmp_path):
    """The settings of a run on one file, which is written."""
    data = write_table(tmp_path / "in/tickets.csv", tickets())
    settings["task"] = {
        "name": "custom", "text": ["sentence"], "label": "label", "max_length": 32, "data": data, "split": dict(GROUPED)
    }  # fmt: skip
    return settings


def test_a_whole_run_on_two_ranks_is_that_of_its_parts_on_one(one_file, tmp_path):
    done = launch("--config", write_config(one_file, tmp_path), bare=2)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    found = parts(tmp_path / "run")
    assert sum(map(len, found.values())) == 600
    groups = {name: {row["customer_id"] for row in rows} for name, rows in found.items()}
    assert len(set.union(*groups.values())) == sum(map(len, groups.values())), "no group in two parts"
    for name in ("dev", "test"):
        assert abs(len(found[name]) - 60) <= 6
        share = sum(row["label"] == "1" for row in found[name]) / len(found[name])
        assert abs(share - sum(label for _, _, label, _ in tickets()) / 600) < 0.05
    original = {str(row[0]): [str(value) for value in row] for row in tickets()}
    assert all([row[name] for name in COLUMNS] == original[row["id"]] for rows in found.values() for row in rows)
    texts = {name: {row["sentence"] for row in rows} for name, rows in found.items()}
    shared = sum(row["sentence"] in texts["train"] for row in found["dev"])
    assert shared and re.search(
        rf"tickets\.csv \(dev\): {shared} of {len(found['dev'])} texts are also in train", done.stdout
    )
    assert re.search(
        r"split into \d+ train, \d+ dev, \d+ test by task\.split \(dev 0\.1, test 0\.1, seed 1, stratified, "
        r"groups of customer_id\)",
        done.stdout,
    )
    report = (tmp_path / "run/report.html").read_text()
    assert "Dev data: " in report and "texts are also in train" in report
    assert results(tmp_path / "run")["n"] == len(found["dev"])
    assert results(tmp_path / "run")["splits"]["test"]["n"] == len(found["test"])

    again = launch("--config", tmp_path / "run.yaml", "--stages", "data")
    assert again.returncode == 0 and "data: done\n" in again.stdout, "on another number of ranks"
    shutil.copytree(tmp_path / "run/data/parts", tmp_path / "parts")
    task = {key: value for key, value in one_file["task"].items() if key != "split"}
    other = one_file | {"run": {"dir": str(tmp_path / "other")}, "task": task | {"data": str(tmp_path / "parts")}}
    (tmp_path / "second").mkdir()
    done = launch("--config", write_config(other, tmp_path / "second"), "--stages", "data")
    assert done.returncode == 0, done.stderr
    for name, one in sets(tmp_path / "run").items():
        two = sets(tmp_path / "other")[name]
        assert (one["digest"], one["examples"], one["per_class"]) == (two["digest"], two["examples"], two["per_class"])
    assert not (tmp_path / "other/data/parts").exists()
    scored = pkd("evaluate", "--model", tmp_path / "run/export", *OWN, "--data", one_file["task"]["data"], "--split", "test",
                 *(f"--split-setting={key}={value}" for key, value in GROUPED.items()))  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["n"] == len(found["test"])


def test_the_order_of_the_rows_and_the_number_of_ranks_do_not_matter(one_file, tmp_path):
    config, seen = write_config(one_file, tmp_path), []
    for ranks, seed in ((1, 0), (2, 0), (2, 1)):
        rows = tickets()
        if seed:
            random.Random(seed).shuffle(rows)
        write_table(tmp_path / "in/tickets.csv", rows)
        done = launch("--config", config, "--stages", "data", "--fresh", bare=ranks if ranks > 1 else 0)
        assert done.returncode == 0, done.stderr
        seen.append(parts(tmp_path / "run"))
        if not seed:
            assert file_digests(tmp_path / "run/data/parts") == file_digests(next(tmp_path.glob("run*/data/parts")))
    ids = [{name: {row["id"] for row in rows} for name, rows in each.items()} for each in seen]
    assert ids[0] == ids[1] == ids[2] and seen[0] == seen[1] != seen[2]


def test_duplicates_are_dropped_or_refused(one_file, tmp_path):
    config = write_config(one_file, tmp_path)
    for ranks in (0, 2):
        refused = launch("--config", config, "task.duplicates=refuse", bare=ranks)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
        assert re.fullmatch(
            r"pkd: task\.duplicates: \d+ of the \d+ texts of dev are also in train, such as '.*'; remove them from one of the "
            r"two, or set drop, which removes them from train, or keep\n",
            refused.stderr,
        )
        assert not (tmp_path / "run").exists()
    assert launch("--config", config, "--stages", "data").returncode == 0
    kept = parts(tmp_path / "run")
    done = launch("--config", config, "--stages", "data", "task.duplicates=drop")
    assert done.returncode == 0 and "task.duplicates changed (keep -> drop)" in done.stdout
    found = parts(tmp_path / "run")
    assert found["test"] == kept["test"]
    texts = {name: [row["sentence"] for row in rows] for name, rows in found.items()}
    assert not set(texts["train"]) & {*texts["dev"], *texts["test"]} and not set(texts["dev"]) & set(texts["test"])
    in_train = [(row["sentence"], row["label"]) for row in found["train"]]
    assert len(set(in_train)) == len(in_train)
    elsewhere = {row["sentence"] for name in ("dev", "test") for row in kept[name]}
    assert set(in_train) == {
        (row["sentence"], row["label"]) for row in kept["train"] if row["sentence"] not in elsewhere
    }
    dropped = len(kept["train"]) - len(found["train"])
    assert f"dropped {dropped} of {len(kept['train'])} examples: " in done.stdout


def test_prepare_shows_the_parts_of_the_run(one_file, tmp_path):
    assert launch("--config", write_config(one_file, tmp_path), "--stages", "data").returncode == 0
    settings = [f"--split-setting={key}={value}" for key, value in GROUPED.items()]
    shown = pkd("prepare", *OWN, "--data", one_file["task"]["data"], *settings)
    assert shown.returncode == 0 and not shown.stderr
    for name, one in sets(tmp_path / "run").items():
        assert f"{name}: {tmp_path}/in/tickets.csv ({name})\n" in shown.stdout
        assert re.search(rf"^{name} +{one['examples']} ", shown.stdout, re.M)
        assert all(f"  {note}\n" in shown.stdout for note in one["notes"]) and (one["notes"] or name == "test")
    plain = pkd("prepare", *OWN, "--data", one_file["task"]["data"])
    assert "by the defaults of task.split (dev 0.1, test 0.1, seed 1, stratified)\n" in plain.stdout
    refused = pkd("prepare", *OWN, "--data", one_file["task"]["data"], *settings, "--duplicates", "refuse")
    assert refused.returncode == 2 and refused.stderr.startswith("pkd: --duplicates: ") and not refused.stdout


def test_a_changed_setting_splits_again_and_what_cannot_work_changes_nothing(one_file, tmp_path):
    config, run = write_config(one_file, tmp_path), tmp_path / "run"
    assert launch("--config", config, "--stages", "data").returncode == 0
    before, kept = file_digests(run), parts(run)
    for setting in ("task.split.group=nobody", "task.duplicates=refuse"):
        assert launch("--config", config, "--stages", "data", setting).returncode == 2
        assert file_digests(run) == before, setting
    done = launch("--config", config, "--stages", "data", "task.split.seed=2")
    assert "data: runs again, because task.split.seed changed (1 -> 2)" in done.stdout
    assert parts(run / "previous/1") == kept != parts(run)
    again = launch("--config", config, "--stages", "data", "task.split.seed=2")
    assert "data: done\n" in again.stdout
    (run / "data/parts/dev.jsonl").write_text("altered\n")
    mended = launch("--config", config, "--stages", "data", "task.split.seed=2")
    assert "parts/dev.jsonl was altered" in mended.stdout and len(parts(run)["dev"]) > 50
    inside = launch("--config", config, "--stages", "data", "task.split=null", f"task.data={run}/data/parts")
    assert inside.returncode == 2 and "is in run.dir; choose another run.dir" in inside.stderr


def test_a_run_of_a_version_without_these_settings_is_found_done(settings, tmp_path):
    config = write_config(settings, tmp_path)
    assert launch("--config", config, "--stages", "data").returncode == 0
    rewrite(tmp_path / "run", "data", lambda marker: marker["inputs"].pop("task.duplicates"))
    assert "data: done\n" in launch("--config", config, "--stages", "data").stdout
    assert not [key for key in json.loads((tmp_path / "run/stages/data.json").read_text())["inputs"] if "split" in key]
    again = launch("--config", config, "--stages", "data", "task.duplicates=drop")
    assert "task.duplicates changed (keep -> drop)" in again.stdout


def test_no_test_part_and_no_settings(one_file, tmp_path):
    done = launch("--config", write_config(one_file, tmp_path), "--stages", "data", "task.split.test=0")
    assert done.returncode == 0 and set(parts(tmp_path / "run")) == {"train", "dev"} == set(sets(tmp_path / "run"))
    done = launch("--config", tmp_path / "run.yaml", "--stages", "data", "--fresh", "task.split=null")
    assert done.returncode == 0 and done.stdout.count("by the defaults of task.split") == 1


BAD = {
    "unknown column": (
        ["task.split.group=customer"],
        r"tickets\.csv:1: has no column 'customer'; the header names 'id', 'sentence', 'label', 'customer_id'",
    ),
    "label as group": (["task.split.group=label"], r"task\.split\.group: label is the label column; name another column"),
    "no dev": (["task.split.dev=0"], r"command line: task\.split\.dev: 0 is invalid; allowed: number > 0, < 1"),
    "nothing to train on": (
        ["task.split.dev=0.5", "task.split.test=0.5"],
        r"task\.split\.dev 0\.5 and task\.split\.test 0\.5 leave nothing to train on; they must add up to less than 1",
    ),
    "unknown key": (["task.split.grup=id"], r"task\.split\.grup: unknown key; did you mean task\.split\.group\?"),
    "unknown policy": (["task.duplicates=remove"], r"task\.duplicates: 'remove' is invalid; allowed: keep or drop or refuse"),
    "a class for each row": (
        ["task.label=id", "task.split=null"],
        r"tickets\.csv: no example is left for dev: there are 600 examples in \d+ different texts, the smallest of 1, and dev "
        r"should have 60; change task\.split\.dev",
    ),
    "a regression of classes": (
        ["task.kind=regression", "task.split.stratify=true"],
        r"task\.split\.stratify: a regression has no classes; remove it",
    ),
    "a folder": (["task.data={at}/in"], r"task\.split: is for one file, and {at}/in has splits; remove it, or give one file"),
    "the hub": (["task.data=hub:a/b"], r"task\.split: is for one file, and hub:a/b has splits; remove it"),
    "no file": (["task.data={at}/in/none.csv"], r"task\.data: no such file: {at}/in/none\.csv"),
    "no table": (["task.data={at}/run.yaml"], r"task\.data: {at}/run\.yaml is a file, but none of \.tsv, \.csv, "),
    "weights of no class": (["task.class_weights={spam: 2}"], r"task\.class_weights: .*spam"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_is_written(one_file, tmp_path, case):
    arguments, expected = BAD[case]
    config = write_config(one_file, tmp_path)
    before = file_digests(tmp_path)
    ranks = 2 if case in ("unknown column", "a class for each row") else 0
    done = launch("--config", config, *(each.replace("{at}", str(tmp_path)) for each in arguments), bare=ranks)
    assert done.returncode == 2 and not done.stdout, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("pkd: "), done.stderr
    assert re.search(expected.replace("{at}", re.escape(str(tmp_path))), done.stderr), done.stderr
    assert file_digests(tmp_path) == before and not (tmp_path / "run").exists()


def test_wrong_rows_are_refused_by_file_and_line_before_anything_is_written(one_file, tmp_path):
    rows = tickets()
    rows[99][2] = ""
    write_table(tmp_path / "in/tickets.csv", rows)
    for extra in ([], ["--dry-run"]):
        done = launch("--config", write_config(one_file, tmp_path), *extra)
        assert done.returncode == 2 and "in/tickets.csv:101: label is empty" in done.stderr
        assert not (tmp_path / "run").exists()
