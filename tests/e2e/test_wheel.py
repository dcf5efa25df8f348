"""The built wheel, installed outside the checkout beside nothing but the packages that it requires.

Nothing is fetched: an environment gets links to the installed files of the distributions that the wheel's own metadata
names for an extra, and of those that they require. A requirement missing from pyproject.toml is an ImportError here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
import venv
import zipfile
from collections import Counter
from email import message_from_string
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT, whole_run, write_config
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SITE = Path(sysconfig.get_path("purelib"))
SOURCES = (
    "pkd_dist", "configs", "ds_configs", "data", "launcher", "slurm", "setup.py", "pyproject.toml", "README.md", "LICENSE",
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that no earlier build/ gets into it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        output,
    ]
    done = subprocess.run([*pip, source], env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(output.glob("*.whl"))


def required(wheel: Path, extra: str) -> set[str]:
    """Return the names of the installed distributions that the wheel requires for an extra, and theirs, and so on."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = message_from_string(archive.read(name).decode()).get_all("Requires-Dist")
    found: dict[tuple[str, str], None] = {}
    waiting = [(line, extra) for line in lines or []]
    while waiting:
        line, of_extra = waiting.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": of_extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in found:
                found[name, wanted] = None
                waiting += [(below, wanted) for below in metadata.requires(name) or []]
    return {name for name, _ in found} - {"pkd-dist"}  # an extra may include others


def install(wheel: Path, extra: str, folder: Path) -> Path:
    """Make an environment with the wheel and the packages of an extra; return its `bin`."""
    venv.create(folder, symlinks=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv" if sys.version_info >= (3, 11) else "posix_prefix", scheme))
    tops = {name: {file.parts[0] for file in metadata.files(name) or []} - {".."} for name in required(wheel, extra)}
    owners = Counter(top for names in tops.values() for top in names)
    for name, own in tops.items():
        for top in own:
            if owners[top] == 1:
                (site / top).symlink_to(SITE / top)
        for file in metadata.files(name) or []:
            if owners[file.parts[0]] > 1:  # a namespace of several distributions
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                (site / file).symlink_to(SITE / file)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--no-deps", "--no-index", wheel]
    done = subprocess.run(pip, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin"


def clean_environment(**extra: str) -> dict[str, str]:
    """Return an environment in which no checkout is importable."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"  # DeepSpeed looks for ninja
    return kept | {"PATH": path, "OMP_NUM_THREADS": "1"} | extra


def run(*argv: object, cwd: Path, status: int = 0, **extra: str) -> str:
    done = subprocess.run(
        list(map(str, argv)), cwd=cwd, env=clean_environment(**extra), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def serving(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, "serve", tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def training(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, "train", tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def searching(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, "sweep", tmp_path_factory.mktemp("searching"))


@pytest.fixture(scope="module")
def folder(body: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with a configuration, as a user has it; the DeepSpeed JSON is the wheel's."""
    folder = tmp_path_factory.mktemp("user")
    settings = whole_run(body, data, folder)
    settings["run"]["dir"] = "run"
    settings["teacher"]["finetune"]["epochs"] = settings["train"]["epochs"] = 1
    settings["export"]["formats"] = ["onnx"]
    write_config(settings, folder)
    return folder


@pytest.fixture(scope="module")
def export(training: Path, folder: Path) -> Path:
    """The export of a run: the training on two ranks of torchrun, then the rest by `pkd distill`, which runs all stages."""
    torchrun = [training / "python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    stages = ["--stages", "data,teacher,cache,init,distill"]
    run(*torchrun, "-m", "pkd_dist.train", "--config", "run.yaml", *stages, cwd=folder)
    out = run(training / "pkd", "distill", "--config", "run.yaml", cwd=folder)
    assert (folder / "run/report.html").exists() and "\nreport: run/report.html\n" in out, out
    return folder / "run/export"


def test_deepspeed_runs_the_module_and_the_ready_files_are_found(export: Path, training: Path, folder: Path):
    where = run(training / "python", "-c", "import pkd_dist; print(pkd_dist.__file__)", cwd=folder)
    assert where.startswith(str(training.parent))
    deepspeed = [
        training / "python",
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "1",
        "--log_level",
        "warning",
    ]
    out = run(*deepspeed, "--module", "pkd_dist.train", "--config", "run.yaml", "--dry-run", cwd=folder)
    assert "deepspeed: ds_configs/zero1.json" in out and "plan:" in out
    run(training / "pkd", "config", "check", "configs/glue/rte.yaml", cwd=folder)
    assert "1,050" in run(training / "pkd", "prepare", cwd=folder), "the embedded data"


def test_pkd_compare(export: Path, training: Path, searching: Path, folder: Path):
    methods = ["--methods", "kd", "--seeds", "1", "--output", "compare"]
    command = ["compare", "--config", "run.yaml", *methods, "teacher.model=run/teacher", "teacher.finetune=null"]
    refused = run(training / "pkd", *command, cwd=folder, status=2)
    assert refused == "pkd: the Python package optuna is not installed: pip install 'pkd_dist[sweep]'\n"
    out = run(searching / "pkd", *command, cwd=folder)
    assert (folder / "compare/compare.json").exists(), out


def test_pkd_serve_needs_no_torch(export: Path, serving: Path, training: Path, folder: Path):
    for name in ("torch", "transformers", "deepspeed"):
        assert f"No module named '{name}'" in run(serving / "python", "-c", f"import {name}", cwd=folder, status=1)
    texts = ["a good film", "the plot was dull"]
    predicted = run(training / "pkd", "predict", "--model", export, "--max-length", "32", *texts, cwd=folder)
    wanted = [json.loads(line) for line in predicted.splitlines()]
    server = subprocess.Popen(
        [serving / "pkd", "serve", export, "--port", "0"], cwd=folder, env=clean_environment(), stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert server.stdout is not None
        address = re.search(r"http://\S+", server.stdout.readline())
        assert address is not None
        body = json.dumps({"texts": texts}).encode()
        request = urllib.request.Request(address[0], body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            answers = json.load(response)["answers"]
    finally:
        server.terminate()
    assert server.wait(60) == 0
    for made, expected in zip(answers, wanted, strict=True):
        assert made["label"] == expected["label"]
        assert made["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)


def test_commands_of_another_extra_name_it(serving: Path, folder: Path):
    expected = r"pkd: the Python package \w+ is not installed: pip install 'pkd_dist\[train\]'\n"
    for command in (
        ["pkd", "distill", "--config", "run.yaml"],
        ["python", "-m", "pkd_dist.train", "--config", "run.yaml"],
    ):
        line = run(serving / command[0], *command[1:], cwd=folder, status=2)
        assert re.fullmatch(expected, line), line


def test_pkd_submit_copies_the_installed_code(serving: Path, training: Path, folder: Path, tmp_path: Path):
    """The job runs the submitting Python, which must be able to train, and the copy, whatever folder it starts in."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 7\n")
    sbatch.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    submit = ["--config", "run.yaml", "--nodes", "2"]
    assert "which lacks the Python package torch: pip install" in run(
        serving / "pkd-submit", *submit, cwd=folder, status=2, PATH=path
    )
    out = run(training / "pkd-submit", *submit, cwd=folder, PATH=path)
    snapshot = folder / "run/slurm/1"
    assert out.startswith("job 7: 2 node(s) x 1 rank(s)") and (snapshot / "train.sbatch").exists()
    assert re.fullmatch(r"v\d+\.\d+\.\d+\n", (snapshot / "code/REVISION").read_text())
    (snapshot / "code/pkd_dist/config/load.py").write_text("raise SystemExit('the copy')")
    job = [training / "python", snapshot / "code/launcher/train.py", "--config", snapshot / "run.yaml", "--dry-run"]
    assert run(*job, cwd=folder, status=1, PYTHONPATH=str(snapshot / "code")) == "the copy\n"
