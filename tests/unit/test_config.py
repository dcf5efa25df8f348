"""The configuration: defaults, errors with place and suggestion, overrides, and the DeepSpeed JSON."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from pkd_dist.config import deepspeed as ds_config
from pkd_dist.config import paths
from pkd_dist.config.deepspeed import load_deepspeed
from pkd_dist.config.load import load
from pkd_dist.config.reference import reference
from pkd_dist.config.schema import Config
from pkd_dist.config.section import fields
from pkd_dist.errors import UserError


def error_of(text, folder, *overrides):
    """The error message of an invalid YAML."""
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load(path, overrides)
    message = str(error.value)
    assert "\n" not in message, "one line"
    return message.replace(str(path), "run.yaml")


def test_defaults_are_complete_and_follow_the_paper():
    config = load(None, ["run.dir=x"])
    assert (config.distill.alpha, config.distill.beta, config.distill.temperature) == (0.5, 100, 5)
    assert (config.distill.patience, config.distill.normalize) == ("skip", True)
    assert config.teacher.finetune is None and config.cache.enabled
    assert Config.model_validate(config.model_dump()) == config
    with pytest.raises(UserError, match=r"^configuration: run\.dir: is missing; it needs a value \(run folder"):
        load(None, ["run.seed=1"])


def test_every_key_is_documented_and_the_document_is_up_to_date():
    keys = [(name, field) for name, field in fields(Config) if "." in name]
    assert len(keys) > 50
    text = reference()
    for name, field in keys:
        assert field.description and field.description.strip().endswith("."), name
        assert f"| `{name}` | " in text, name
    assert (ROOT / "docs/configuration.md").read_text() == text, "run `make docs`"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path):
    load_deepspeed(load(path), path)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.name)
def test_every_shipped_deepspeed_configuration_loads(path):
    loaded = load_deepspeed(load(None, ["run.dir=x", f"train.deepspeed=ds_configs/{path.name}"]))
    assert loaded == json.loads(path.read_text())
    assert loaded["zero_optimization"]["stage"] == int(path.name[4])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "run: {dir: x}\ndistill:\n  alpah: 1\n",
            "run.yaml:3: distill.alpah: unknown key; did you mean distill.alpha?",
        ),
        ("run: {dir: x}\nepochs: 3\n", "run.yaml:2: epochs: unknown key; did you mean train.epochs?"),
        ("run: {dir: x}\nzzz: 3\n", "run.yaml:2: zzz: unknown key; `pkd config reference` lists the known keys"),
        (
            "run: {dir: x}\ntrain:\n  epochs: 3\n  epochs: 4\n",
            "run.yaml:4: train.epochs is duplicated (first on line 3)",
        ),
        ("run: {dir: x}\nrun: {dir: y}\n", "run.yaml:2: run is duplicated (first on line 1)"),
        ("run: {dir: x}\ntrain:\n  epochs: true\n", "run.yaml:3: train.epochs: a true/false value is not allowed here"),
        ("run: {dir: x}\ndistill: {alpha: no}\n", "run.yaml:2: distill.alpha: a true/false value is not allowed here"),
        (
            "run: {dir: x}\ntrain: {epochs: 1.5}\n",
            "run.yaml:2: train.epochs: 1.5 is invalid; allowed: integer >= 1",
        ),
        ("run: {dir: x}\ndistill: {alpha: .nan}\n", "run.yaml:2: distill.alpha: nan is invalid"),
        (
            "run: {dir: x}\ndistill: {beta: .inf}\n",
            "run.yaml:2: distill.beta: inf is invalid; allowed: a finite number",
        ),
        (
            "run: {dir: x}\ncheckpoint: {keep: 1}\n",
            "run.yaml:2: checkpoint.keep: 1 is invalid; allowed: integer >= 2",
        ),
        (
            "run: {dir: x}\ncache: {dtype: int8}\n",
            "cache.dtype: 'int8' is invalid; allowed: float16 or bfloat16 or float32",
        ),
        (
            "run: {dir: x}\ndistill: {patience: [0]}\n",
            "distill.patience: [0] is invalid; allowed: skip or last or list of integer >= 1",
        ),
        ("run: {dir: x}\ndistill: {patience: [2, 1]}\n", "must be increasing without repeats, not [2, 1]"),
        ("run: {dir: x}\nstudent: {layers: []}\n", "run.yaml:2: student.layers is empty; it must name at least one"),
        (
            "run: {dir: x}\nstudent: {layers: [-1, 2]}\n",
            "student.layers: -1 is invalid; allowed: list of integer >= 0 or null",
        ),
        (
            "run: {dir: x}\nstudent: {layers: [1], num_layers: 2}\n",
            "student.num_layers 2 contradicts student.layers [1]",
        ),
        ("run: {dir: x}\nstudent: {init: random, layers: [1]}\n", "use student.num_layers"),
        (
            "run: {dir: x}\nstudent: {init: my/folder, hidden_size: 16}\n",
            "student.hidden_size is not allowed with a folder",
        ),
        ("run: {dir: x}\ntask: {name: custom}\n", "task.name custom needs task.text: [column] or [column_a, column_b]"),
        (
            "run: {dir: x}\ntask: {unlabeled: more.txt}\n",
            "task.unlabeled: 'more.txt' is invalid; allowed: list of text",
        ),
        ("run: {dir: x}\ntask: {augment: {copies: 0}}\n", "run.yaml:2: task.augment.copies: 0 is invalid"),
        (
            "run: {dir: x}\ntask: {augment: {mask: .7, replace: .4}}\n",
            "task.augment.mask 0.7, task.augment.replace 0.4 and task.augment.neighbours 0.0 must add up to at most 1",
        ),
        (
            "run: {dir: x}\ntask: {class_weights: even}\n",
            "task.class_weights: 'even' is invalid; allowed: balanced or mapping of text to number > 0 or null",
        ),
        (
            "run: {dir: x}\ntask: {class_weights: {a: 0}}\n",
            "task.class_weights: a section is invalid; allowed: balanced or mapping of text to number > 0 or null",
        ),
        ("run: {dir: x}\ntask: {class_weights: {no: 2}}\n", "put a class name such as 'no' in quotes"),
        ("- run\n", "run.yaml: must contain sections such as `run:` and `task:`, not a list"),
        ("", "run.yaml: run.dir: is missing; it needs a value (run folder, for everything that a run writes)"),
        ("run: {dir: null}\n", "run.yaml:1: run.dir: is empty; it needs a value (run folder"),
        ('run: {dir: "a\\0b"}\n', "run.yaml:1: run.dir: a NUL character is not allowed in a path or a name"),
        (
            'run: {dir: x}\nteacher: {model: ["a", "a\\0b"]}\n',
            "run.yaml:2: teacher.model: a NUL character is not allowed",
        ),
        ("run: {dir: ''}\n", "run.yaml:1: run.dir: is empty; it needs a value (run folder"),
        ("run: {dir: x}\ndistill: {foo: 1}\n", "distill.foo: unknown key; the keys of distill are preset, alpha, beta"),
        ("run: {dir: x}\ntrain: {lr: 1}\n", "train.lr: unknown key; did you mean train.learning_rate?"),
        ("run: {dir: x}\ntrain: {bs: 1}\n", "train.bs: unknown key; did you mean train.batch_size?"),
        ("teacher: {finetune: {lr: 1}}\n", "finetune.lr: unknown key; did you mean teacher.finetune.learning_rate?"),
        ("trian: {lr: 1}\n", "run.yaml:1: trian: unknown key; did you mean train?"),
        ("run: {dir: x}\ntrackers: {wandb: yes}\n", "not allowed here; allowed: offline, online, null; YAML reads yes"),
        ("run: {dir: x}\ntrain: 5\n", "train: 5 is invalid; allowed: a section of keys such as train.epochs"),
        ("run: {dir: x}\ntrain: {epochs: }\n", "train.epochs: null is invalid; allowed: integer >= 1"),
        ("run: {dir: x}\nexport: {formats: []}\n", "export.formats: [] is invalid; allowed: at least 1 entry"),
        ("run: {dir: x\n", "run.yaml:2: not valid YAML: expected ',' or '}'"),
        ("run: !!python/object:os.system {}\n", "run.yaml:1: not valid YAML: could not determine a constructor"),
        (b"run: {dir: \xff}\n", "run.yaml: cannot be read as UTF-8 text"),
        ("run: " + "[" * 2000 + "]" * 2000, "run.yaml: nested too deeply"),
        ("run: " + "{a: " * 2000 + "}" * 2000, "run.yaml: nested too deeply"),
        ("run: &a {dir: x, more: *a}\n", "run.yaml: nested too deeply"),
        ("run: {dir: x, seed: 2020-13-01}\n", "run.yaml: has a value that YAML cannot read: month must be in 1..12"),
        ("run: {dir: x, seed: " + "9" * 5000 + "}\n", "run.yaml: has a value that YAML cannot read: Exceeds the limit"),
    ],
)
def test_errors_name_file_line_and_key(tmp_path, text, message):
    assert message in error_of(text, tmp_path)


def test_number_formats(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("\ufeffrun: {dir: x}\ntrain: {learning_rate: 1e-4, warmup_ratio: 0}\n")
    assert isinstance(yaml.safe_load("1e-4"), str), "text in YAML 1.1, but the schema accepts it"
    assert load(path).train.learning_rate == 1e-4
    assert load(path).train.warmup_ratio == 0.0
    assert load(path, ["train.learning_rate=2E-05"]).train.learning_rate == 2e-5


def test_unlabeled_text_augmentation_and_class_weights(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {dir: x}\ntask:\n  unlabeled: [a.txt, b.tsv]\n  augment: {}\n  class_weights: {0: 2, 'no': 1e-1}\n"
    )
    task = load(path, ["task.augment.copies=3"]).task
    assert task.unlabeled == ["a.txt", "b.tsv"] and task.class_weights == {"0": 2.0, "no": 0.1}
    assert task.augment and task.augment.model_dump() == {
        "copies": 3,
        "mask": 0.1,
        "replace": 0.1,
        "neighbours": 0.0,
        "ngram": 0.25,
        "min_confidence": 0.0,
        "seed": 1,
    }
    assert load(path, ["task.class_weights=balanced"]).task.class_weights == "balanced"


def test_the_command_line_takes_precedence_and_is_named_in_errors(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run: {dir: x}\nstudent: {layers: [1]}\n")
    config = load(
        path, ["student.layers=[0, 2]", "teacher.finetune.epochs=7", "run.dir=a=b", "teacher.finetune.epochs=8"]
    )
    assert config.student.layers == [0, 2] and config.run.dir == "a=b"
    assert config.teacher.finetune and config.teacher.finetune.epochs == 8, "the last one wins"
    assert load(path, ["student.layers=null"]).student.layers is None
    for override, message in {
        "train.epochs": "'train.epochs' is not of the form section.key=value",
        "=3": "'=3' is not of the form section.key=value",
        "train.epochs=[": "the value is not valid YAML",
        "train.epochs=0": "train.epochs: 0 is invalid",
        "train.epoch=1": "train.epoch: unknown key; did you mean train.epochs?",
        "student.layers.0=1": "student.layers is a value, not a section",
    }.items():
        with pytest.raises(UserError, match="^command line: ") as error:
            load(path, [override])
        assert message in str(error.value)


def test_a_run_is_frozen():
    with pytest.raises(Exception, match="frozen"):
        load(None, ["run.dir=x"]).train.epochs = 3


def deepspeed(folder, text):
    (folder / "ds.json").write_text(text)
    return load_deepspeed(load(None, ["run.dir=x", f"train.deepspeed={folder}/ds.json"]), "my.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ds.json:1: not valid JSON"),
        ("[1]", "ds.json: must contain one JSON object, not a list"),
        ('{"bf16": ' + "[" * 100_000 + "]" * 100_000 + "}", "ds.json: nested too deeply"),
        ('{"bf16": ' + "9" * 5000 + "}", "ds.json: cannot be read: Exceeds the limit"),
        (
            '{"bf16": {"enabled": true}, "fp16": {"enabled": true}}',
            "bf16 and fp16 are both enabled; enable one precision",
        ),
        ('{"bf16": {"enabled": true}, "torch_autocast": {"enabled": "auto"}}', "torch_autocast and bf16 are both"),
        ('{"zero_optimization": {"stage": 4}}', "ds.json: zero_optimization.stage must be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": true}}', "ds.json: zero_optimization.stage must be 0, 1, 2 or 3, not True"),
        ('{"zero_optimization": 1}', 'ds.json: zero_optimization must be an object such as {"stage": 1}'),
        ('{"zero_optimisation": {"stage": 1}}', "unknown key; did you mean zero_optimization?"),
        ('{"bf16": true}', 'ds.json: bf16 must be an object such as {"enabled": true}'),
        ('{"fp16": {"enabled": "auto"}}', "ds.json: fp16.enabled: 'auto' is invalid; allowed: true, false"),
        (
            '{"torch_autocast": {"enabled": true, "dtype": "foo"}}',
            "torch_autocast.dtype: 'foo' is invalid; allowed: auto",
        ),
        ('{"bf16": {"enabled": true}, "bf16": {}}', "ds.json: bf16 is duplicated"),
        *[
            (
                json.dumps({key: value}),
                f"ds.json: {key} conflicts with my.yaml, where {ds_config.OWNED_BY_YAML[key]} sets it",
            )
            for key, value in {
                "train_batch_size": 32,
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": 2,
                "gradient_clipping": 0.0,
                "optimizer": {"type": "Adam"},
                "scheduler": {"type": "WarmupLR"},
            }.items()
        ],
    ],
)
def test_a_deepspeed_json_that_contradicts_the_run(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        deepspeed(tmp_path, text)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_auto_is_allowed_and_removed(tmp_path):
    given = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "fp16": {"enabled": False},
        "bf16": {"enabled": True},
    }
    assert deepspeed(tmp_path, json.dumps(given)) == {"fp16": {"enabled": False}, "bf16": {"enabled": True}}
    with pytest.raises(UserError, match=r"^my\.yaml: train\.deepspeed: no such file: nowhere\.json$"):
        load_deepspeed(load(None, ["run.dir=x", "train.deepspeed=nowhere.json"]), "my.yaml")


def test_owned_keys_are_in_the_schema():
    known = {name for name, _ in fields(Config)}
    for owners in ds_config.OWNED_BY_YAML.values():
        assert set(owners.replace(" and ", ", ").split(", ")) <= known


def test_first_k_requires_finetune():
    with pytest.raises(UserError, match=r"student\.init first_k .* give that model's folder as student\.init"):
        load(None, ["run.dir=x", "student.init=first_k"])
    assert load(None, ["run.dir=x", "student.init=first_k", "teacher.finetune.epochs=1"]).student.init == "first_k"


def test_project_files_are_found_in_the_checkout_and_in_an_installed_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "site/pkd_dist"
    for folder in (package / "defaults/ds_configs", tmp_path / "site/ds_configs", tmp_path / "ds_configs"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(paths, "_PACKAGE", package)
    name = "ds_configs/zero1.json"
    assert paths.project_path(name) == Path(name), "found nowhere: as the user wrote it"
    for place in (tmp_path / "site", package / "defaults"):
        (place / name).write_text("{}")
        assert paths.project_path(name) == place / name
    Path(name).write_text("{}")
    assert paths.project_path(name) == Path(name)
    assert paths.project_path(tmp_path / "none") == tmp_path / "none"
