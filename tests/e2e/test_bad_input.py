"""Bad input through the real launcher: status 2, one line that says what is wrong, and nothing lost or overwritten.

The tables hold (files to write, arguments, the line expected); `{at}` is the test's own folder.
"""

import json
import re
import shutil
import signal
import socket
from dataclasses import replace

import pytest
import torch
from conftest import launch, refused, sentences, started, until, write_config, write_tsv

from pkd_dist.stages.base import Markers
from pkd_dist.stages.translation import translate
from pkd_dist.training.engine import cpu_has_float16

HEADER = "sentence\tlabel\n"
GOOD_DEV = HEADER + "a good film\t1\na dull plot\t0\n"
PAIRS = "sentence1\tsentence2\tscore\n"


def contents(folder):
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


CONFIGURATION = {
    "unknown key": ({}, ["distill.alpah=0.2"], r"command line: distill\.alpah: .*did you mean distill\.alpha\?"),
    "unknown key in the file": (
        {"run.yaml": "run: {dir: r}\ndistill:\n  alpah: 0.2\n"},
        [],
        r"run\.yaml:3: distill\.alpah: unknown key; did you mean distill\.alpha\?",
    ),
    "wrong type": ({}, ["train.epochs=many"], r"train\.epochs: 'many' is invalid; allowed: integer >= 1"),
    "alpha": ({}, ["distill.alpha=1.5"], r"distill\.alpha: 1\.5 is invalid; allowed: number >= 0, <= 1"),
    "temperature": ({}, ["distill.temperature=0"], r"distill\.temperature: 0 is invalid; allowed: number > 0"),
    "epochs": ({}, ["train.epochs=-1"], r"train\.epochs: -1 is invalid; allowed: integer >= 1"),
    "no file": ({}, ["--config", "{at}/none.yaml"], r"{at}/none\.yaml: no such configuration file"),
    "invalid YAML": ({"run.yaml": "run: {dir: r}\ntrain: {epochs: 1\n"}, [], r"run\.yaml:3: not valid YAML: "),
    "override": ({}, ["train.epochs"], r"'train\.epochs' is not of the form section\.key=value"),
    "stage": ({}, ["--stages", "data,distil"], r"--stages: 'distil' is not a stage; allowed: data, teacher, cache"),
    "layers repeated": (
        {},
        ["student.layers=[1,1]"],
        r"student\.layers must be increasing without repeats, .*\[1, 1\]",
    ),
    "layers unsorted": (
        {},
        ["student.layers=[3,1]"],
        r"student\.layers must be increasing without repeats, .*\[3, 1\]",
    ),
    "no JSON": ({}, ["train.deepspeed={at}/no.json"], r"run\.yaml: train\.deepspeed: no such file: {at}/no\.json"),
    "broken JSON": (
        {"ds.json": '{"bf16":\n'},
        ["train.deepspeed={at}/ds.json"],
        r"{at}/ds\.json:2: not valid JSON: Expecting value",
    ),
    "JSON against YAML": (
        {"ds.json": '{"train_batch_size": 8}'},
        ["train.deepspeed={at}/ds.json"],
        r"{at}/ds\.json: train_batch_size conflicts with {at}/run\.yaml, where train\.batch_size sets it",
    ),
    "two precisions": (
        {"ds.json": '{"bf16": {"enabled": true}, "fp16": {"enabled": true}}'},
        ["train.deepspeed={at}/ds.json"],
        r"{at}/ds\.json: bf16 and fp16 are both enabled; enable one precision",
    ),
    "data folder": (
        {},
        ["task.data={at}/none"],
        r"task\.data: no such folder: {at}/none; it must contain train and dev",
    ),
    "data file": (
        {"all.csv": "x"},
        ["task.data={at}/all.csv"],
        r"{at}/all\.csv:1: has no column 'sentence'; the header names 'x'",
    ),
    "option twice": ({}, ["--stages", "data", "--stages", "cache"], r"--stages is given twice; it takes one value"),
    "split": (
        {"own/train.tsv": GOOD_DEV},
        ["task.data={at}/own"],
        r"task\.data: {at}/own has no split 'dev'; expected one of dev\.tsv, dev\.csv",
    ),
    "layers out of range": ({}, ["student.layers=[1,4]"], r"student\.layers: layer 4 is out of range; .* 0 to 3"),
    "longer than the teacher reads": (
        {},
        ["task.max_length=65"],
        r"task\.max_length: 65 is more than .* can read; give at most 64",
    ),
    "patience": (
        {},
        ["distill.patience=[1,2]"],
        r"distill\.patience: \[1, 2\] names 2 teacher layer\(s\), but a 2-layer student has 1 to pair",
    ),
    "relations of a layer": (
        {},
        ["distill.relations=1", "distill.relation_layer=5"],
        r"distill\.relation_layer: 5 is out of range; the teacher's layers are 1 to 4",
    ),
    "relation heads": (
        {},
        ["distill.relations=1", "distill.relation_heads=7"],
        r"distill\.relation_heads: 7 does not divide the teacher's width, 32",
    ),
    "attention of a narrower student": (
        {},
        ["distill.attention=1", "student.layers=null", "student.init=random", "student.hidden_size=16"],
        r"distill\.attention: the teacher has 2 attention heads, the student 1; use distill\.relations",
    ),
    "Gram matrices of one layer": (
        {},
        ["distill.gram=1", "student.layers=[3]"],
        r"distill\.gram: a student of one layer has none to compare; set distill\.pair_last_layer=true",
    ),
    "run folder": (
        {"taken": "a file"},
        ["run.dir={at}/taken/run"],
        r"run\.dir: {at}/taken/run is not writable \(.+\); choose another run\.dir",
    ),
    "results in a file": (
        {"taken.json": "{}"},
        ["evaluate.result_dir={at}/taken.json"],
        r"evaluate\.result_dir: {at}/taken\.json is a file; give a folder",
    ),
    "results of another run": (
        {"elsewhere/results_eval.json": "{}"},
        ["evaluate.result_dir={at}/elsewhere"],
        r"evaluate\.result_dir: {at}/elsewhere/results_eval\.json exists, but this run did not make it; choose another folder",
    ),
    "float16 without scaled losses": (
        {"ds.json": '{"torch_autocast": {"enabled": true, "dtype": "float16"}}'},
        ["train.deepspeed={at}/ds.json"],
        r"{at}/ds\.json: torch_autocast\.dtype: 'float16' is invalid; allowed: auto, bfloat16; float16 needs scaled losses",
    ),
    "decay without one": (
        {},
        ["train.decay_ratio=0.5"],
        r"train\.decay_ratio is allowed only with train\.schedule warmup_stable_decay, not linear",
    ),
    "divergence from no teacher": (
        {},
        ["evaluate.best_by=divergence", "distill.alpha=0", "distill.beta=0"],
        r"evaluate\.best_by: divergence compares with the teacher, .*\(distill\.alpha is 0, .*; use metric",
    ),
    "teacher not fine-tuned": (
        {},
        ["teacher.finetune=null"],
        r"teacher\.model: .* is not fine-tuned .*teacher\.finetune",
    ),
}


@pytest.mark.skipif(cpu_has_float16() or torch.cuda.is_available(), reason="this device trains in float16")
def test_fp16_on_a_cpu_is_refused_by_the_run_and_its_dry_run(settings, tmp_path):
    settings["train"]["deepspeed"] = "ds_configs/zero1_fp16.json"
    config = write_config(settings, tmp_path)
    line = refused("--config", config)
    assert line.startswith("pkd: train.deepspeed: fp16 is enabled in the DeepSpeed JSON, but this CPU"), line
    assert refused("--config", config, "--dry-run") == line and not (tmp_path / "run").exists()
    assert refused("--config", config, bare=2) == line
    assert launch("--config", config, "--stages", "data").returncode == 0, "which trains nothing"
    assert refused("--config", config, "--dry-run") == line


@pytest.mark.parametrize("case", CONFIGURATION)
def test_a_wrong_setting_is_refused_before_anything_is_written(settings, tmp_path, case):
    files, arguments, expected = CONFIGURATION[case]
    config = write_config(settings, tmp_path)
    put(tmp_path, files)
    before = contents(tmp_path)
    own = [] if "--config" in arguments else ["--config", config]
    line = refused(*own, *(a.replace("{at}", str(tmp_path)) for a in arguments))
    assert re.search(expected.replace("{at}", re.escape(str(tmp_path))), line), line
    assert contents(tmp_path) == before and not (tmp_path / "run").exists()


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


DATA = {
    "column": ({"train": "text\tlabel\nfine\t1\n"}, r"train\.tsv:1: has no column 'sentence'; the header names 'text'"),
    "too few fields": (
        {"train": GOOD_DEV + "no label\n"},
        r"train\.tsv:4: has 1 field\(s\) where the header names 2: sentence, label",
    ),
    "label not seen in training": (
        {"train": HEADER + "x\tno\ny\tyes\n", "dev": HEADER + "x\tno\ny\tmaybe\n"},
        r"dev\.tsv:3: label 'maybe' is not one of the labels seen in training: no, yes",
    ),
    "label not a number": (
        {"train": PAIRS + "a\tb\t1.5\nc\td\thigh\n", "dev": PAIRS + "a\tb\t1\n"},
        r"train\.tsv:3: score 'high' is not a number; a regression needs one",
    ),
    "empty file": ({"train": ""}, r"train\.tsv: is empty; expected a header line and examples"),
    "header only": ({"train": HEADER}, r"train\.tsv: has no examples; at least one is needed"),
    "empty sentence": ({"train": GOOD_DEV + " \t0\n"}, r"train\.tsv:4: sentence is empty; give it a value or remove"),
    "invalid UTF-8": (
        {"train": GOOD_DEV.encode() + b"caf\xe9\t1\n"},
        r"train\.tsv:4: byte 0xe9 is not valid UTF-8; save the file as UTF-8",
    ),
    "one class": (
        {"train": HEADER + "x\t1\ny\t1\n"},
        r"train\.tsv: every example has the label '1'; training needs at least two classes",
    ),
}
TASKS = {
    "label not seen in training": ["task.name=custom", "task.text=[sentence]", "task.label=label"],
    "label not a number": ["task.name=stsb"],
}


@pytest.mark.parametrize("case", DATA)
def test_wrong_data_is_refused_by_file_and_line(settings, tmp_path, case):
    texts, expected = DATA[case]
    put(tmp_path, {f"own/{split}.tsv": text for split, text in ({"train": GOOD_DEV, "dev": GOOD_DEV} | texts).items()})
    before = contents(tmp_path / "own")
    config = write_config(settings, tmp_path)
    line = refused("--config", config, f"task.data={tmp_path}/own", *TASKS.get(case, []), "--stages", "data")
    assert re.search(f"^pkd: {re.escape(str(tmp_path))}/own/{expected}", line), line
    assert contents(tmp_path / "own") == before
    assert not (tmp_path / "run/data").exists(), "nothing half-made"


def test_more_ranks_than_examples(settings, tmp_path):
    put(tmp_path, {"own/train.tsv": GOOD_DEV, "own/dev.tsv": GOOD_DEV})
    config = write_config(settings, tmp_path)
    line = refused("--config", config, f"task.data={tmp_path}/own", "--stages", "data", bare=3)
    assert line.endswith("own/train.tsv: 2 examples for 3 ranks; use at most as many ranks as examples")


def relabel(folder, *names, **fields):
    """Makes a body's configuration say that it is a classifier of these classes."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["BertForSequenceClassification"], "id2label": dict(enumerate(names))}
    (folder / "config.json").write_text(json.dumps(config | {"label2id": {n: i for i, n in enumerate(names)}} | fields))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def without_tokenizer(folder):
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)


AS_IT_IS = "teacher.finetune=null"
TEACHERS = {
    "config": (lambda f: (f / "config.json").unlink(), [], r"{at} has no config\.json; expected a Hugging Face model"),
    "weights": (lambda f: (f / "model.safetensors").unlink(), [], r"{at} has no weights; expected one of model\.safet"),
    "tokenizer": (without_tokenizer, [], r"{at} has no tokenizer; expected one of tokenizer\.json"),
    "truncated": (lambda f: truncate(f / "model.safetensors"), [], r"{at} cannot be loaded: .*incomplete"),
    "classes": (
        lambda f: relabel(f, "a", "b", "c"),
        [AS_IT_IS],
        r"{at} has 3 classes, sst2 has 2 \(0, 1\); give a model of this task, or set teacher\.finetune",
    ),
    "class names": (
        lambda f: relabel(f, "cat", "dog"),
        [AS_IT_IS],
        r"its classes are cat, dog, those of sst2 are negative, positive; map them with task\.class_names, or give a model",
    ),
    "one name for two classes": (
        lambda f: relabel(f, "yes", "yes"),
        [AS_IT_IS],
        r"{at} calls two of its outputs 'yes' \(id2label in its config\.json\); give each a name of its own$",
    ),
    "several classes for a text": (
        lambda f: relabel(f, "no", "yes", problem_type="multi_label_classification"),
        [AS_IT_IS],
        r"{at} is a multi-label classifier: .*; give a model of this task, or set teacher\.finetune",
    ),
    "a regression with two outputs": (
        lambda f: relabel(f, "no", "yes", problem_type="regression"),
        [AS_IT_IS],
        r"{at} is a regression with 2 outputs \(problem_type regression in its config\.json\)",
    ),
    "token classification": (
        lambda f: relabel(f, "no", "yes", architectures=["BertForTokenClassification"]),
        [AS_IT_IS],
        r"{at} is a model for token classification \(BertForTokenClassification\), .*; give a sequence classifier of this task$",
    ),
    "multiple choice": (
        lambda f: relabel(f, "no", "yes", architectures=["BertForMultipleChoice"]),
        [AS_IT_IS],
        r"{at} is a model for multiple choice \(BertForMultipleChoice\), .*; give a sequence classifier of this task$",
    ),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_a_teacher_that_cannot_be_used(settings, body, tmp_path, case):
    damage, arguments, expected = TEACHERS[case]
    folder = tmp_path / "bert"
    shutil.copytree(body, folder)
    damage(folder)
    before = contents(folder)
    config = write_config(settings, tmp_path)
    line = refused("--config", config, f"teacher.model={folder}", *arguments, "--stages", "data,teacher")
    assert line.startswith("pkd: teacher.model: ") and re.search(expected.replace("{at}", str(folder)), line), line
    assert contents(folder) == before
    assert not (tmp_path / "run/teacher").exists()


# ------------------------------------------------------------------------------------------- what must go on


def test_glues_quirks_and_a_metrics_port_in_use_stop_nothing(settings, tmp_path):
    rows = ['"half a quote\t1', 'say "yes" twice\t0', "it's \"\t1", "plain\t0", '"\t1']
    train = "\ufeff" + "\r\n".join(["sentence\tlabel", *rows]) + "\r\n"
    put(tmp_path, {"own/train.tsv": train, "own/dev.tsv": GOOD_DEV})
    settings["metrics"] = {"enabled": True}
    config = write_config(settings, tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = launch("--config", config, f"task.data={tmp_path}/own", f"metrics.port={port}", "--stages", "data")
    assert done.returncode == 0 and not done.stderr, done.stderr
    said = re.search(rf"metrics: port {port} is in use; serving on (\d+) instead", done.stdout)
    assert said and int(said[1]) > port and f"http://127.0.0.1:{said[1]}/metrics" in done.stdout, done.stdout
    assert "own/train.tsv: 5 examples" in done.stdout and "own/dev.tsv: 2 examples" in done.stdout
    outputs = json.loads((tmp_path / "run/stages/data.json").read_text())["outputs"]
    assert outputs["sets"]["train"]["examples"] == 5 and outputs["sets"]["train"]["per_class"] == [2, 3]


# -------------------------------------------------------------------------------------- a run's own files, damaged


@pytest.fixture(scope="module")
def stopped(body, data, tmp_path_factory):
    """A run stopped in the middle of its distillation, with two checkpoints."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(data, folder / "data")
    settings = {
        "run": {"dir": str(folder / "run")},
        "task": {"name": "sst2", "data": str(folder / "data"), "max_length": 32},
        "teacher": {"model": str(body), "finetune": {"epochs": 1, "learning_rate": 3e-3, "batch_size": 16}},
        "student": {"layers": [1, 3]},
        "train": {"epochs": 8, "batch_size": 16, "learning_rate": 3e-3},
        "cache": {"shard_rows": 50},
        "checkpoint": {"every_steps": 5, "min_seconds": 0},
        "evaluate": {"latency_samples": 10},
        "export": {"formats": ["safetensors"]},
        "metrics": {"enabled": False},
    }
    with started("--config", write_config(settings, folder), "--stages", "data,teacher,cache,init,distill") as [job]:
        until("checkpoints/step-00000010/commit.json", folder / "run", [job])
        job.send_signal(signal.SIGUSR1)
        output = job.communicate(timeout=120)
        assert job.returncode == 75, output
    return folder, settings


@pytest.fixture(scope="module")
def finished(stopped, tmp_path_factory):
    """The same run, gone on to its end."""
    return copy_run(*stopped, tmp_path_factory.mktemp("finished"), finish=True)


def copy_run(folder, settings, target, finish=False):
    """A copy of a run with its data, and its settings."""
    for name in ("run", "data"):
        shutil.copytree(folder / name, target / name)
    settings = json.loads(json.dumps(settings).replace(str(folder), str(target)))
    if finish:
        done = launch("--config", write_config(settings, target))
        assert done.returncode == 0, done.stdout + done.stderr
    return target, settings


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run to damage: its folder and its YAML."""
    folder, settings = copy_run(*finished, tmp_path)
    return folder / "run", write_config(settings, folder)


def products(run):
    """What a run has made; its settings and messages apart."""
    return {name: value for name, value in contents(run).items() if not name.startswith(("logs/", "config.yaml"))}


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_a_shard_is_found(copy):
    run, config = copy
    flip(run / "cache/shard-00002.safetensors", -1)
    before = products(run)
    line = refused("--config", config)
    assert f"{run}/cache/shard-00002.safetensors: the shard's checksum is wrong" in line
    assert products(run) == before


def test_a_missing_shard_alone_is_built_again(copy):
    run, config = copy
    shards = sorted((run / "cache").glob("shard-*.safetensors"))
    assert len(shards) == 5
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in shards}
    shards[1].unlink()
    done = launch("--config", config)
    assert done.returncode == 0, done.stderr
    assert "shard-00001.safetensors" in done.stdout and "distill: done\n" in done.stdout, done.stdout
    for path in shards:
        content, mtime = before[path.name]
        assert path.read_bytes() == content, path.name
        assert (path.stat().st_mtime_ns == mtime) == (path != shards[1]), path.name


def test_an_exchanged_teacher_is_refused(copy, body):
    run, config = copy
    shutil.copy(body / "model.safetensors", run / "teacher/model.safetensors")
    before = products(run)
    line = refused("--config", config)
    assert re.search(r"/run/teacher: is not the teacher that this run made and cached", line), line
    assert products(run) == before


def test_the_cache_of_another_teacher_is_refused(copy, body):
    run, config = copy
    other = shutil.copytree(body, run.parent / "other")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / "teacher" / name, other)
    flip(other / "model.safetensors", -2)
    before = products(run)
    line = refused("--config", config, f"run.dir={run}2", f"teacher.model={other}", AS_IT_IS, f"cache.dir={run}/cache")
    assert re.search(
        r"/run/cache: this cache belongs to another run; it differs in teacher \(cache: \w+, this run: \w+\); set", line
    )
    assert products(run) == before


def test_a_cache_of_another_format_is_refused(copy):
    run, config = copy
    manifest = run / "cache/manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 99'))
    before = products(run)
    line = refused("--config", config)
    assert f"{manifest}: has format version 99, expected 1; remove the folder" in line
    assert products(run) == before


def test_data_broken_after_a_run_costs_nothing(copy):
    run, config = copy
    train = run.parent / "data/train.tsv"
    whole, before = train.read_bytes(), products(run)
    write_tsv(train, [*sentences(50, 1), ("neither", 7)])
    assert re.search(r"train\.tsv:52: label '7' is not one of the labels: 0, 1", refused("--config", config))
    for name in ("teacher/model.safetensors", "cache/manifest.json", "export/model.safetensors", "results_eval.json"):
        assert (run / name).read_bytes() == before[name], name
    train.write_bytes(whole)
    again = launch("--config", config)
    assert again.returncode == 0 and "distill: done\n" in again.stdout and "report: done\n" in again.stdout


@pytest.fixture
def halfway(stopped, tmp_path):
    """A copy of the stopped run: its YAML and its committed checkpoints, oldest first."""
    folder, settings = copy_run(*stopped, tmp_path)
    return write_config(settings, folder), sorted((folder / "run/checkpoints").glob("step-*"))


def test_a_damaged_checkpoint_goes_back_to_the_one_before(halfway):
    config, (older, newest) = halfway
    damaged = max(newest.rglob("*.safetensors"), key=lambda p: p.stat().st_size)
    truncate(damaged)
    done = launch("--config", config, "--stages", "distill")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert re.search(rf"resuming from {older.name}: {damaged} has \d+ bytes, not \d+", done.stdout), done.stdout
    assert "distill: done in" in done.stdout


def test_an_older_damaged_checkpoint_and_a_replaced_one_hinder_nothing(halfway):
    config, (older, newest) = halfway
    shutil.copytree(newest, newest.with_name(f"{newest.name}.earlier"))  # killed before its predecessor was removed
    (older / "state.json").write_bytes(b"")
    unknown = newest.parent / ".tmpAbC123"  # as safetensors left it, killed while it wrote best weights
    unknown.write_bytes(bytes(100))
    done = launch("--config", config, "--stages", "distill")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert f"({newest.name})" in done.stdout and "distill: done in" in done.stdout, done.stdout
    left = {path.name for path in newest.parent.iterdir()}
    assert len(left) == 3 and all(name.startswith(("best-", "step-")) for name in left), left


def test_damaged_best_weights_are_made_again(copy):
    """Killed after the last step, with the weights of an earlier epoch damaged: no checkpoint holds them."""
    run, config = copy
    markers = Markers(run, translate)
    marker = markers.read("distill")
    markers._write("distill", replace(marker, done=False, outputs=None))
    [best] = run.glob("checkpoints/best-*")
    assert best.name not in {f"best-{path.name[5:]}.safetensors" for path in run.glob("checkpoints/step-*")}
    before = products(run)
    flip(best, -1)
    done = launch("--config", config)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert f"{best} was altered (its checksum is wrong), and no later epoch is better" in done.stdout, done.stdout
    after = products(run)
    for name in (f"checkpoints/{best.name}", "metrics.jsonl", "export/model.safetensors"):
        assert after[name] == before[name], name


def test_no_intact_checkpoint_is_refused(halfway):
    config, checkpoints = halfway
    for checkpoint in checkpoints:
        truncate(checkpoint / "rank-0000.safetensors")
    before = products(config.parent / "run")
    before.pop("stages/distill.json")  # which counts its starts
    line = refused("--config", config, "--stages", "distill")
    assert re.search(
        r"rank-0000\.safetensors has \d+ bytes, not \d+; no intact checkpoint is left in .*--fresh", line
    ), line
    after = products(config.parent / "run")
    assert json.loads(after.pop("stages/distill.json"))["done"] is False and after == before
