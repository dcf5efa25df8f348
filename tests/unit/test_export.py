"""Every file of an export agrees with the student on all of dev, or the export is rejected."""

import json
import os
import shutil
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import environment
from exports import export, one_scale_for_the_batch, subject, with_outlier
from families import FAMILIES
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from pkd_dist.cli.main import app
from pkd_dist.config.load import load
from pkd_dist.data import tokens
from pkd_dist.errors import UserError
from pkd_dist.evaluation.compare import Side
from pkd_dist.evaluation.predictions import Predictions
from pkd_dist.evaluation.scoring import forward_of, predict_logits_single
from pkd_dist.export import build, independence, int8, manifest, onnx
from pkd_dist.export.runtime import OnnxModel
from pkd_dist.files import digest_of, sha256
from pkd_dist.serve.model import ServedModel

pytestmark = pytest.mark.usefixtures("one_thread")


def export_all(folder, family, **fields):
    """Return the folder of an export in every format, and its manifest."""
    output = folder / "export"
    return output, export(
        subject(folder, family, **fields), output, "onnx", "onnx-fp16", "onnx-int8", "torch-export", "triton"
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    before = os.umask(0o022)  # another user reads it in a test
    try:
        return export_all(tmp_path_factory.mktemp("bert"), "bert")
    finally:
        os.umask(before)


@pytest.fixture
def exported(bert):
    return bert[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, bert, tmp_path):
    two_layers = {"n_layers" if family == "distilbert" else "num_hidden_layers": 2}
    folder, found = bert if family == "bert" else export_all(tmp_path, family, **two_layers)
    assert manifest.verify(folder) == {k: v for k, v in found.items() if k != "digest"}
    assert set(found["files_on_dev"]) == {
        "model.safetensors", *(f"onnx/model{kind}.onnx" for kind in ("", ".fp16", ".int8")), "torch_export/model.pt2",
    }  # fmt: skip
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = ["a good film", "bad", "the plot was very dull and the story empty " * 3]
    given = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = plain(**given).logits.numpy()
    for name, tolerance in (("model.onnx", 1e-5), ("model.fp16.onnx", 0.02), ("model.int8.onnx", 0.5)):
        model = OnnxModel(folder / "onnx" / name, 1)
        np.testing.assert_allclose(model(given), logits, atol=tolerance)
        assert model.inputs == list(given), "the graph takes the tokenizer's outputs"
    for name, file in found["files_on_dev"].items():
        exact = "fp16" not in name and "int8" not in name
        assert independence.holds(file, exact) and file["batch_changed_labels"] == 0
    program = torch.export.load(folder / "torch_export/model.pt2").module()
    np.testing.assert_allclose(program(**given).detach().numpy(), logits, atol=1e-5)
    for name, content in contents(folder):
        for place in (bytes(folder.parent), b"/pkd_dist/", b"/site-packages/", b"/lib/python"):
            assert place not in content, f"{name} names a folder of this machine: {place!r}"


def contents(folder):
    """Every file of an export, and every member of its archives."""
    for path in folder.rglob("*"):
        if path.suffix == ".pt2":
            with zipfile.ZipFile(path) as archive:
                yield from ((f"{path.name}/{name}", archive.read(name)) for name in archive.namelist())
        elif path.is_file():
            yield path.name, path.read_bytes()


def operators(path):
    import onnx as onnx_package

    return [node.op_type for node in onnx_package.load(path).graph.node]


def test_the_graph_is_fused_and_its_last_layer_computes_one_row(tmp_path):
    made = subject(tmp_path)
    onnx.write(made.student, made.tokenizer, tmp_path / "model.onnx")
    found = operators(tmp_path / "model.onnx")
    assert found.count("Attention") == 3 and found.count("Softmax") == 1, "the last of four layers is not fused"
    assert found.count("SkipLayerNormalization") == 8 and found.count("BiasGelu") == 4
    onnx.split_norms(tmp_path / "model.onnx")
    found = operators(tmp_path / "model.onnx")
    assert found.count("Sum") == 8 and "SkipLayerNormalization" not in found
    onnx.write_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx", "per token")
    quantised = operators(tmp_path / "int8.onnx")
    assert quantised.count("MultiHeadAttention") == 3 and "Attention" not in quantised
    assert quantised.count("MatMulIntegerToFloat") == 3 + 4 * 3, "query, key and value of three layers; three of each"
    assert quantised.count("QuantizeLinear") == quantised.count("MatMulIntegerToFloat")
    assert (tmp_path / "int8.onnx").stat().st_size < 0.6 * (tmp_path / "model.onnx").stat().st_size


def test_no_scale_of_int8_rows_is_subnormal(tmp_path):
    """Runtimes may count subnormal numbers as zero, and zeros would be divided by zero."""
    import onnx as onnx_package
    from onnx import numpy_helper

    made = subject(tmp_path)
    with torch.no_grad():
        made.student.bert.embeddings.word_embeddings.weight[7] = 0
        made.student.bert.encoder.layer[0].intermediate.dense.weight[3] = 0
    onnx.write(made.student, made.tokenizer, tmp_path / "model.onnx")
    onnx.write_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx", "per token")
    graph = onnx_package.load(tmp_path / "int8.onnx").graph
    scales = [numpy_helper.to_array(table) for table in graph.initializer if table.name.endswith("_scale")]
    smallest = np.array([scale.min() for scale in scales])
    assert (smallest >= np.finfo(np.float32).tiny).all()
    assert (smallest == np.finfo(np.float32).tiny).sum() == 2, "of the row and of the column of zeros"


def test_a_file_with_other_logits_is_rejected_and_nothing_is_left(tmp_path, monkeypatch):
    made = subject(tmp_path)
    write = onnx.write

    def shifted(model, tokenizer, path):
        with torch.no_grad():
            model.classifier.bias[0] += 0.01
        write(model, tokenizer, path)
        with torch.no_grad():
            model.classifier.bias[0] -= 0.01

    monkeypatch.setattr(onnx, "write", shifted)
    with pytest.raises(
        UserError, match=r"onnx/model.onnx: logits differ from PyTorch's by 0.01\d* on dev, more than 1e-04"
    ):
        export(made, tmp_path / "export", "onnx")
    assert not list(tmp_path.glob("*export*"))


def test_int8_that_loses_too_much_is_rejected_and_the_previous_export_stays(tmp_path, monkeypatch):
    import onnx as onnx_package

    made = subject(tmp_path)
    student, dev = made.student, made.dev

    def logits():
        with torch.inference_mode():
            return predict_logits_single(lambda given: student(**given).logits, dev, 16, made.pad_id)

    with torch.no_grad():  # both classes as often; labels that the student gets right
        student.classifier.bias[1] -= float(np.median(np.diff(logits())))
    made = replace(made, dev=replace(dev, labels_N=logits().argmax(1)))
    export(made, tmp_path / "export")
    before = (tmp_path / "export/manifest.json").read_bytes()
    write = onnx.write_int8

    def worse(source, path, how):
        write(source, path, how)
        model = onnx_package.load(path)
        last = next(node for node in model.graph.node if "logits" in node.output)
        for tensor in model.graph.initializer:
            if tensor.name in last.input:
                tensor.CopyFrom(
                    onnx_package.numpy_helper.from_array(-onnx_package.numpy_helper.to_array(tensor), tensor.name)
                )
        onnx_package.save(model, path)

    monkeypatch.setattr(onnx, "write_int8", worse)
    with pytest.raises(
        UserError, match=r"model.int8.onnx: accuracy on dev is \d+\.\d+ points below PyTorch's 100.00, more than 2.22"
    ):
        export(made, tmp_path / "export", "onnx", "onnx-int8")
    assert (tmp_path / "export/manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.glob("*export*")] == ["export"]


def test_the_int8_file_is_the_one_that_agrees_best(tmp_path):
    found = export(subject(tmp_path), tmp_path / "export", "onnx-int8")
    assert not (tmp_path / "export/onnx/model.onnx").exists(), "float32 was not requested"
    file = found["files_on_dev"]["onnx/model.int8.onnx"]
    assert set(file["tried"]) == set(int8.QUANTIZATIONS)
    assert file["agreement"] == max(tried["agreement"] for tried in file["tried"].values())


def test_the_files_are_set_beside_the_teacher_on_dev_and_test(tmp_path):
    """PyTorch's answers to test are those of the evaluation, unless the student has changed since."""
    made, test = subject(tmp_path), tokens.open_tokens(tmp_path / "train")
    teacher = Side(subject(tmp_path / "teacher", num_hidden_layers=3).student, {"dev": made.dev}, made.pad_id)
    sets = {"dev": made.dev, "test": test}
    answers = {}
    with torch.inference_mode():
        for split, of in sets.items():
            sides = {
                side: predict_logits_single(forward_of(model), of, 16, made.pad_id)
                for side, model in (("teacher", teacher.model), ("student", made.student))
            }
            answers[split] = Predictions(of.ids_N, np.asarray(of.labels_N), sides)
    labels_N = np.concatenate([np.asarray(of.labels_N) for of in sets.values()])
    wanted = {
        side: float((np.concatenate([answers[split].predicted[side] for split in sets]) == labels_N).mean())
        for side in ("teacher", "student")
    }
    right_N = answers["test"].predicted["student"] == answers["test"].labels_N
    answers["test"].logits["student"][:] *= -1  # none of the files gives these answers
    found = export(replace(made, reference=build.Reference(teacher, test, answers)), tmp_path / "export", "onnx")
    rows = {row["file"]: row for row in found["deployment"]["rows"]}
    assert list(rows) == ["teacher", "model.safetensors", "onnx/model.onnx"]
    assert found["deployment"]["splits"] == ("dev", "test") and found["deployment"]["examples"] == len(labels_N)
    assert found["deployment"]["deploy"] == "onnx/model.onnx"
    assert rows["teacher"]["score"] == pytest.approx(wanted["teacher"]) and rows["teacher"]["parameters"] > 0
    assert rows["onnx/model.onnx"]["score"] == pytest.approx(wanted["student"])
    assert rows["onnx/model.onnx"]["bytes"] == (tmp_path / "export/onnx/model.onnx").stat().st_size
    assert rows["onnx/model.onnx"]["speed"] == {
        key: found["files_on_dev"]["onnx/model.onnx"][key] for key in rows["teacher"]["speed"]
    }
    reused = wanted["student"] + ((~right_N).sum() - right_N.sum()) / len(labels_N)
    assert rows["model.safetensors"]["score"] == pytest.approx(reused)
    answers["dev"].logits["student"][:] *= -1
    found = export(replace(made, reference=build.Reference(teacher, test, answers)), tmp_path / "changed")
    assert found["deployment"]["rows"][1]["score"] == pytest.approx(wanted["student"])
    assert found["deployment"]["deploy"] == "model.safetensors"
    assert manifest.verify(tmp_path / "changed")["deployment"]["deploy"] == "model.safetensors"


def test_the_answer_to_a_text_does_not_depend_on_its_batch(tmp_path):
    """Batches of texts of 3 to 30 tokens, some of which have states far larger than the others."""
    made = with_outlier(subject(tmp_path))
    onnx.write(made.student, made.tokenizer, tmp_path / "model.onnx")
    onnx.split_norms(tmp_path / "model.onnx")

    def effect(write, how):
        write(tmp_path / "model.onnx", tmp_path / "int8.onnx", how)
        return independence.measure(OnnxModel(tmp_path / "int8.onnx", 1), made.dev, made.pad_id)

    assert effect(one_scale_for_the_batch, "")["batch_effect"] > 100 * independence.TOLERANCE
    for how in int8.QUANTIZATIONS:
        found = effect(onnx.write_int8, how)
        assert independence.holds(found, exact=False) and found["batch_changed_labels"] == 0


def test_an_int8_file_may_round_a_rare_value_differently_in_a_batch(tmp_path):
    """A student of the paper's grid had one such answer of 256, which moved by 0.003."""
    alone_NC, together_NC = np.zeros((256, 2), np.float32), np.zeros((256, 2), np.float32)
    together_NC[7, 0] = 0.012
    found = independence.compare(alone_NC, together_NC)
    assert found["batch_effect"] == pytest.approx(0.003, rel=0.01)
    assert found["batch_effect_mean"] == pytest.approx(found["batch_effect"] / 256)
    assert independence.holds(found, exact=False) and not independence.holds(found, exact=True)
    together_NC[7, 0] = 0.12  # moves by 0.03, and by 0.0001 on average
    assert not independence.holds(independence.compare(alone_NC, together_NC), exact=False)
    verifier = build._Verifier(subject(tmp_path), lambda: None)
    verdict = {"largest_difference": 0.0, "main_metric": verifier.main_metric, **found}
    verifier.require_good("int8", verdict, exact=False)
    with pytest.raises(UserError, match="float32: other texts in a batch move an answer on dev by 0.003 .*, more than"):
        verifier.require_good("float32", verdict, exact=True)


def test_a_file_whose_answers_depend_on_the_batch_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "write_int8", one_scale_for_the_batch)
    monkeypatch.setattr(build, "LOSS_ALLOWED", 1.0)
    with pytest.raises(
        UserError,
        match=r"model.int8.onnx: other texts in a batch move an answer on dev by .* on average.*, more than 0.02, or 0.001 on average",
    ):
        export(with_outlier(subject(tmp_path)), tmp_path / "export", "onnx-int8")
    assert not list(tmp_path.glob("*export*"))


def test_a_family_that_cannot_be_written_is_rejected_in_one_line(tmp_path, monkeypatch):
    made = subject(tmp_path)

    def forward(input_ids, attention_mask, **_):
        return None if input_ids.sum() > 0 else 1

    monkeypatch.setattr(made.student, "forward", forward)
    with pytest.raises(
        UserError, match="export.formats: a bert cannot be written as onnx .*; leave onnx out of it"
    ) as told:
        onnx.write(made.student, made.tokenizer, tmp_path / "model.onnx")
    assert "\n" not in str(told.value)


def test_formats_bring_what_they_need():
    def formats(given):
        return load(None, ["run.dir=x", f"export.formats={given}"]).export.formats

    assert formats("[onnx-int8, onnx-int8]") == ["safetensors", "onnx-int8"]
    assert formats("[triton]") == ["safetensors", "onnx", "triton"]
    assert formats("[triton, onnx-int8]") == ["safetensors", "onnx-int8", "triton"]
    with pytest.raises(UserError, match="export.formats"):
        formats("[tensorrt]")


def one_byte(folder):
    path = folder / "onnx/model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def renamed_label(folder):
    config = json.loads((folder / "config.json").read_text())
    config["id2label"]["1"] = "good"
    (folder / "config.json").write_text(json.dumps(config))


def other_figure(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"max_length": 32', '"max_length": 33'))


def sealed(folder, **changed):
    """Change a manifest and recompute its digest."""
    content = json.loads((folder / "manifest.json").read_text()) | changed
    del content["digest"]
    (folder / "manifest.json").write_text(json.dumps(content | {"digest": digest_of(content)}))


DAMAGE = {
    "one byte": (one_byte, "onnx/model.onnx was altered; export it again"),
    "a missing file": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing; export it again"),
    "a renamed label": (renamed_label, "config.json was altered"),
    "a file too many": (lambda folder: (folder / "vocab.txt").write_text("a"), "vocab.txt: does not belong to the export"),
    "another figure": (other_figure, "manifest.json: was altered"),
    "a manifest nested deep": (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "manifest.json: cannot be read"),
    "a link too many": (lambda folder: (folder / "etc").symlink_to("/etc"), "etc: does not belong to the export"),
    "a name that no file has": (lambda folder: sealed(folder, files={"a" * 5000: "0"}), "names a file that cannot be read"),
    "half a manifest": (lambda folder: (folder / "manifest.json").write_text('{"files"'), "manifest.json: cannot be read"),
    "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json: is not the manifest of an export"),
    "a newer format": (lambda folder: (folder / "manifest.json").write_text('{"files": {}, "format_version": 2}'), "version 2 is not supported"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json; give a folder"),
}  # fmt: skip


@pytest.mark.parametrize("command", [["export", "verify"], ["serve"]])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_export_is_rejected(damage, command, exported, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    harm, message = DAMAGE[damage]
    harm(folder)
    done = CliRunner().invoke(app, [*command, str(folder)])
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def configured(exported, tmp_path, change):
    """Return a copy of an export as if it had been written with another config.json."""
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    sealed(folder, files=manifest.read(exported)["files"] | {"config.json": sha256(folder / "config.json")})
    return folder


def test_class_names_that_transformers_leaves_out_are_served(exported, tmp_path):
    folder = configured(exported, tmp_path, lambda config: config.pop("id2label"))
    assert set(ServedModel(folder, threads=1).answer([("good",)])[0]["probabilities"]) == {"LABEL_0", "LABEL_1"}


@pytest.mark.parametrize("command", [["serve"], ["predict", "fine", "--model"]])
def test_an_export_whose_answers_are_no_classes_is_rejected(command, exported, tmp_path):
    folder = configured(exported, tmp_path, lambda config: config.update(problem_type="regression"))
    done = CliRunner().invoke(app, [*command, str(folder)])
    assert done.exit_code == 2 and f"{folder} is a regression with 2 outputs" in done.stderr, done.stderr
    assert (
        "(problem_type regression in its config.json)" in done.stderr
        and done.stderr.count("\n") == 1
        and not done.stdout
    )


def test_a_model_of_several_classes_is_served(exported, tmp_path):
    folder = configured(exported, tmp_path, lambda config: config.update(problem_type="multi_label_classification"))
    [answer] = ServedModel(folder, threads=1).answer([("good",)])
    assert isinstance(answer["labels"], list) and len(answer["scores"]) == 2


READ = """
import json, os, sys
import onnxruntime, transformers

def read(folder):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    given = transformers.AutoTokenizer.from_pretrained(folder)("a good film", return_tensors="pt")
    session = onnxruntime.InferenceSession(folder + "/onnx/model.onnx", providers=["CPUExecutionProvider"])
    arrays = {name: array.numpy() for name, array in given.items()}
    return [model(**given).logits.tolist(), session.run(["logits"], arrays)[0].tolist()]

wanted = read(sys.argv[1])  # imports what may be readable by root alone
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
found = read(sys.argv[1])
for path, _, names in os.walk(sys.argv[1]):
    for name in names:
        open(os.path.join(path, name), "rb").close()
print(json.dumps([os.getuid(), found == wanted]))
"""
"""Reads an export as root and as nobody."""


def test_another_user_reads_the_export(exported):
    """As a server does that runs as a user of its own: plain transformers, ONNX Runtime, and every file."""
    if os.geteuid():
        pytest.skip("becoming another user needs root")
    with tempfile.TemporaryDirectory() as place:  # pytest's folders are closed to others
        os.chmod(place, 0o755)
        shutil.copytree(exported, f"{place}/export")
        (Path(place) / "read.py").write_text(READ)
        alone = environment(HOME="/nonexistent")
        done = forked.run(Path(place) / "read.py", [f"{place}/export"], Path(place), [alone], 120)
    assert done.returncode == 0 and json.loads(done.stdout) == [65534, True], done.stdout + done.stderr


def test_verify_says_that_all_is_well(exported):
    done = CliRunner().invoke(app, ["export", "verify", str(exported)])
    assert done.exit_code == 0 and "files as they were written" in done.stdout, done.output
    for argv in (["export", "verify"], ["export", "verify", "a", "b"], ["export", "--formats", "onnx"]):
        assert CliRunner().invoke(app, argv).exit_code == 2


def test_triton_takes_the_configuration(exported):
    model_config_pb2 = schema()
    from google.protobuf import text_format

    repository = exported / "triton"
    files = {"student": "model.onnx", "student_fp16": "model.fp16.onnx", "student_int8": "model.int8.onnx"}
    assert {path.name for path in repository.iterdir()} == {*files, "README.md"}
    for name, file in files.items():
        config = text_format.Parse((repository / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        graph = OnnxModel(repository / name / "1/model.onnx", 1)
        assert config.name == name and config.backend == "onnxruntime" and config.max_batch_size > 1
        assert config.HasField("dynamic_batching") and config.dynamic_batching.max_queue_delay_microseconds > 0
        assert [given.name for given in config.input] == graph.inputs
        assert {given.data_type for given in config.input} == {model_config_pb2.TYPE_INT64}
        assert [list(given.dims) for given in config.input] == [[-1]] * len(graph.inputs)
        assert [(out.name, list(out.dims), out.label_filename) for out in config.output] == [
            ("logits", [2], "labels.txt")
        ]
        assert (repository / name / "labels.txt").read_text().split() == ["negative", "positive"]
        assert (repository / name / "1/model.onnx").read_bytes() == (exported / "onnx" / file).read_bytes()


def schema():
    """Load Triton's schema from its client package, whose other modules need gRPC."""
    import importlib.metadata
    import importlib.util

    files = importlib.metadata.files("tritonclient")
    path = next(file.locate() for file in files if str(file) == "tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
