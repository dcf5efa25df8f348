"""Imports point one way, stages know only earlier stages, and heavy or special packages have one user."""

import ast
from pathlib import Path

import pytest

from pkd_dist.stages.base import NAMES

PACKAGE = Path(__file__).parents[2] / "pkd_dist"
ORDER = [
    "errors", "files", "network", "limits", "loading", "metric_names", "environment", "config", "telemetry", "lock", "distributed", "data", "model",
    "evaluation", "distillation", "training", "export", "report", "stages", "disk_space", "pipeline", "serve", "search", "comparison", "cli", "train", "api",
]  # fmt: skip
"""Modules and folders of the package; each imports only from those before it, and from its own folder."""

ONLY_USER = {
    "deepspeed": {"training"},
    "mpi4py": {"distributed"},
    "optuna": {"search"},
    "torch.distributed": {"distributed"},
}
"""Package -> the folders that may import it."""
SHARED_BY_STAGES = {"labels", "changes", "base", "context", "run_folder", "progress", "translation"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, ast.parse(path.read_text())


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(tree):
    """The modules of this package that a module imports, without the package's name."""
    return {target.removeprefix("pkd_dist.") for target in imported(tree) if target.startswith("pkd_dist.")}


def folder(module):
    return module.partition(".")[0]


MODULES = dict(modules())
every_module = pytest.mark.parametrize("name", MODULES)


@every_module
def test_imports_point_one_way(name):
    assert folder(name) in ORDER, f"{name} has no place in ORDER; add it here and in docs/architecture.md"
    for target in own(MODULES[name]):
        if folder(target) in ORDER:
            assert ORDER.index(folder(target)) <= ORDER.index(folder(name)), (
                f"{name} imports {target}, which comes later"
            )


def later_stages(name, tree):
    """The stages that a stage imports although they run after it."""
    reached = NAMES[: NAMES.index(name) + 1]
    stages = {target.split(".")[1] for target in own(tree) if target.startswith("stages.")}
    return stages & set(NAMES) - set(reached)


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_imports_only_earlier_stages(name):
    assert not later_stages(name, MODULES[f"stages.{name}"])


def test_the_check_of_stages_finds_a_later_one():
    assert later_stages("init", ast.parse("from pkd_dist.stages.export import ExportOutput")) == {"export"}


def test_every_stage_is_a_module_and_every_module_is_known():
    found = {name.split(".")[1] for name in MODULES if name.startswith("stages.")}
    assert found == {*NAMES, *SHARED_BY_STAGES}
    for shared in SHARED_BY_STAGES:
        stages = {target.split(".")[1] for target in own(MODULES[f"stages.{shared}"]) if target.startswith("stages.")}
        assert not stages & set(NAMES), f"stages/{shared}.py imports a stage"


@every_module
def test_special_packages_have_one_user(name):
    for package, users in ONLY_USER.items():
        if any(target == package or target.startswith(package + ".") for target in imported(MODULES[name])):
            assert folder(name) in users


@pytest.mark.parametrize("name", ["stages.base", "cli.launch", "cli.main"])
def test_what_refuses_early_imports_no_torch(name):
    """Followed through the package's own modules, leaving out imports inside functions."""
    seen, todo = set(), {name}
    while todo:
        module = todo.pop()
        seen.add(module)
        top = ast.Module([node for node in MODULES[module].body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        assert not {target for target in imported(top) if folder(target) in ("torch", "transformers", "deepspeed")}, (
            module
        )
        todo |= {target for target in own(top) if target in MODULES} - seen


def test_every_folder_is_in_the_document():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    for place in ORDER:
        assert f"`{place}" in text, place
