"""The requirements in pyproject.toml are those that pkd_dist imports, and the files that a wheel needs exist."""

import ast
import sys
from importlib import metadata

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pkd_dist import __version__
from pkd_dist.config.paths import packaged_path, project_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USERS_EXTRAS = ("train", "serve", "sweep", "tensorboard", "wandb")
FOR_TYPES = {"_typeshed", "google", "pydantic_core"}
"""Imported for annotations alone; pydantic requires its core, onnx protobuf."""
IMPORTED_BY_TORCH = {"onnxscript", "tensorboard"}


def declared(*extras: str) -> set[str]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(line).name) for line in lines} - {"pkd-dist"}


def imported() -> set[str]:
    modules: set[str] = set()
    for path in (ROOT / "pkd_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.partition(".")[0])
    owners = metadata.packages_distributions()
    return {canonicalize_name(owners[name][0]) for name in modules - sys.stdlib_module_names - FOR_TYPES - {"pkd_dist"}}


def test_every_import_is_declared_and_every_requirement_is_imported():
    assert imported() | IMPORTED_BY_TORCH == declared(*USERS_EXTRAS)


def test_serving_requires_no_training_packages():
    assert not declared("serve") & {"torch", "transformers", "deepspeed", "datasets", "safetensors"}


def test_the_lock_holds_every_requirement():
    locked = {line.partition("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}
    extras = PROJECT["optional-dependencies"]
    assert declared(*extras) - {"pkd-dist"} <= locked


def test_the_citation_names_the_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize(
    "name", ["ds_configs/zero1.json", "configs/demo.yaml", "launcher/train.py", "slurm/train.sbatch"]
)
def test_packaged_files_are_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert packaged_path(name) == project_path(name) == ROOT / name
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).touch()
    assert project_path(name).resolve() == tmp_path / name, "the user's own file first"
    assert packaged_path(name) == ROOT / name
    assert project_path("configs/none.yaml").parts == ("configs", "none.yaml")
