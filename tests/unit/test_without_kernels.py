"""The product without `pkd_dist/kernels/`: nothing needs the folder, and a student trains to the same weights."""

import ast
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment

PACKAGE = ROOT / "pkd_dist"
TRAIN = """
import importlib.util, sys, torch

# An editable install would find the missing folder in the checkout.
sys.meta_path = [finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")]
from pkd_dist.model.encoder import Encoder, load_model, load_tokenizer

folder, output, kernels = sys.argv[1:]
assert "pkd_dist.kernels" not in sys.modules
assert (importlib.util.find_spec("pkd_dist.kernels") is not None) == (kernels == "with")
torch.manual_seed(1)
encoder = Encoder(load_model(folder, new_head=True, dropout=0.0)).train()
assert encoder.first_token_only and encoder.fused == (kernels == "with")
inputs = load_tokenizer(folder)(["a good film", "the plot was very dull"], padding=True, return_tensors="pt")
optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
for _ in range(3):
    logits, states, *_ = encoder(inputs, (1, 2))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])) + states.square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
torch.save(encoder.state_dict(), output)
"""


def imports_of_kernels(tree):
    """Imports of the folder that run when the module is imported."""
    for node in tree.body:
        for inner in [node] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ast.walk(node):
            names = [alias.name for alias in inner.names] if isinstance(inner, (ast.Import, ast.ImportFrom)) else []
            module = getattr(inner, "module", None) or ""
            if any(f"{module}.{name}".strip(".").startswith("pkd_dist.kernels") for name in names):
                yield inner.lineno


def test_no_module_needs_the_folder_to_be_imported():
    for path in PACKAGE.rglob("*.py"):
        if PACKAGE / "kernels" not in path.parents:
            assert not list(imports_of_kernels(ast.parse(path.read_text()))), path


@pytest.mark.parametrize(
    "line", ["import pkd_dist.kernels", "from pkd_dist.kernels import native", "from pkd_dist import kernels"]
)
def test_an_import_of_the_folder_is_found(line):
    assert list(imports_of_kernels(ast.parse(line))) == [1]
    assert list(imports_of_kernels(ast.parse(f"try:\n    {line}\nexcept ImportError:\n    pass"))) == [2]
    assert not list(imports_of_kernels(ast.parse(f"def f():\n    {line}")))


def test_a_student_trains_to_the_same_weights(body, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "pkd_dist", ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    found = []
    for root, kernels in ((ROOT, "with"), (tmp_path, "without")):
        command = [sys.executable, "-c", TRAIN, str(body), str(tmp_path / kernels), kernels]
        subprocess.run(command, cwd=root, env=environment(PYTHONPATH=str(root)), check=True, timeout=300)
        found.append(torch.load(tmp_path / kernels))
    assert found[0].keys() == found[1].keys()
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=1e-6, msg=name)
