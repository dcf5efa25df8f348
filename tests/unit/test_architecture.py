"""The house: imports point one way, and heavy or special packages have one user."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "pkd_dist"
ORDER = [
    "errors", "files", "network", "config", "telemetry", "kernels", "lock", "distributed", "data", "model", "evaluation", "distillation",
    "training", "export", "report", "stages", "pipeline", "serve", "comparison", "cli",
]  # fmt: skip
"""Each imports only what stands before it (or in its own folder)."""

ONLY_USER = {
    "deepspeed": {"training.deepspeed_engine"},
    "mpi4py": {"distributed.ranks"},
    "torch.distributed": {"distributed.world"},
}


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


def place(module):
    return next((i for i, room in enumerate(ORDER) if module == room or module.startswith(room + ".")), None)


@pytest.mark.parametrize(("name", "tree"), list(modules()), ids=[name for name, _ in modules()])
def test_imports_point_upwards(name, tree):
    assert place(name) is not None, f"{name} has no place in the house; give it one here and in docs/architecture.md"
    for target in imported(tree):
        if target.startswith("pkd_dist."):
            where = place(target.removeprefix("pkd_dist."))
            if where is not None:
                assert where <= place(name), f"{name} imports {target}, which stands below it"


@pytest.mark.parametrize(("name", "tree"), list(modules()), ids=[name for name, _ in modules()])
def test_special_packages_have_one_user(name, tree):
    for package, users in ONLY_USER.items():
        if any(target == package or target.startswith(package + ".") for target in imported(tree)):
            assert name in users


def test_every_room_stands_in_the_document():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    for room in ORDER:
        assert room.split(".")[0] in text
