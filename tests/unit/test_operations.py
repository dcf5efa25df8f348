"""Compiled operations of an encoder layer against formulas in float64, dropout included; and machines without a compiler."""

import copy
import logging
import os
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from pkd_dist.kernels import native
from pkd_dist.kernels.operations import CompiledOperations, TorchOperations, select_operations
from pkd_dist.model.encoder import Encoder

LOW, SEED = torch.bfloat16, 0x1234_5678_9ABC_DEF0


@pytest.fixture(scope="module")
def compiled():
    kernels = native.load_kernels()
    assert kernels is not None, "the tests need a C compiler"
    return CompiledOperations(kernels)


@pytest.fixture
def seeded(monkeypatch):
    monkeypatch.setattr("pkd_dist.kernels.operations.draw_seed", lambda: SEED)


def kept(count, p):
    """The factors of dropout for elements 0, 1, ...: the hash of kernels.c, in NumPy."""
    with np.errstate(over="ignore"):
        h = np.arange(count, dtype=np.uint32) + np.uint32(SEED & 0xFFFFFFFF)
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D) + np.uint32(SEED >> 32)
        h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
        h ^= h >> np.uint32(16)
    return torch.from_numpy(((h >> np.uint32(1)) >= int(p * 2**31)) / (1 - p))


def close(got, wanted, msg):
    """The error is at most a few bfloat16 roundings of the largest value."""
    error, scale = (got.double() - wanted).abs().max().item(), wanted.abs().max().item()
    assert error <= 0.01 * scale + 1e-6, f"{msg}: {error} of {scale}"


def attention(qkv_BL3Ad, mask_B1L, keep, queries=None):
    q, k, v = qkv_BL3Ad.permute(2, 0, 3, 1, 4)
    q = q[:, :, :queries]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask_B1L is not None:
        scores = scores + mask_B1L[:, None].double()
    share = scores.softmax(-1)
    return ((share if keep is None else share * keep) @ v).transpose(1, 2).flatten(0, 1).flatten(1)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(("length", "size"), [(1, 32), (7, 16), (16, 64), (33, 32), (50, 48), (130, 64)])
def test_attention_and_its_gradient(compiled, seeded, length, size, p):
    torch.manual_seed(length)
    B, A, keys = 3, 2, -(-length // 16) * 16
    qkv = torch.randn(B, length, 3, A, size).to(LOW)
    grad = torch.randn(B * length, A * size).to(LOW)
    mask = torch.zeros(B, 1, length, dtype=LOW)
    mask[1, :, (length + 1) // 2 :] = torch.finfo(LOW).min
    mask[2] = torch.finfo(LOW).min  # only padding
    mask = mask if p else None
    keep = kept(B * A * length * keys, p).view(B, A, length, keys)[..., :length] if p else None
    context, sums, saved = compiled.attend(*qkv.unbind(2), mask, size**-0.5, p)
    into = torch.empty_like(qkv)
    compiled.attend_backward(saved, grad.view(B, length, A, size), None, into.unbind(2))
    exact = qkv.double().requires_grad_()
    wanted = attention(exact, mask, keep)
    wanted.backward(grad.double())
    close(context.reshape(wanted.shape), wanted.detach(), "context")
    for i, name in enumerate(("query", "key", "value")):
        close(into.view(qkv.shape)[:, :, i], exact.grad[:, :, i], name)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(("length", "queries"), [(1, 1), (19, 3), (16, 12), (40, 6)])
def test_attention_of_states_that_are_keys_and_values(compiled, seeded, length, queries, p):
    """As in a last layer for the first token alone: few queries, and the sums of the weights after dropout."""
    torch.manual_seed(length)
    B, H, keys = 3, 48, -(-length // 16) * 16
    sought, states = torch.randn(queries, B, H).to(LOW), torch.randn(B, length, 1, H).to(LOW)
    grad, grad_sums = torch.randn(queries, B, H).to(LOW), torch.randn(B, 1, queries)
    mask = torch.zeros(B, 1, length, dtype=LOW)
    mask[1, :, (length + 1) // 2 :] = torch.finfo(LOW).min
    keep = kept(B * queries * keys, p).view(B, queries, keys)[..., :length]
    q, x = (t.double().requires_grad_() for t in (sought.transpose(0, 1), states[:, :, 0]))
    share = (q @ x.transpose(1, 2) * 0.2 + mask.double()).softmax(-1) * keep
    wanted = (share @ x, share.sum(-1))
    torch.autograd.backward(wanted, (grad.transpose(0, 1).double(), grad_sums[:, 0].double()))

    def heads(x_QBH):
        return x_QBH.transpose(0, 1)[:, :, None]

    ways = {"compiled": (compiled, LOW)} | ({} if p else {"by torch": (TorchOperations(torch.float64), torch.float64)})
    for name, (operations, dtype) in ways.items():
        its_states = states.to(dtype)
        context, sums, saved = operations.attend(
            heads(sought.to(dtype)), its_states, its_states, mask.to(dtype), 0.2, p
        )
        grad_q, grad_x = torch.empty(queries, B, H, dtype=dtype), torch.empty(states.shape, dtype=dtype)
        operations.attend_backward(saved, heads(grad.to(dtype)), grad_sums, (heads(grad_q), grad_x, grad_x))
        near = close if dtype == LOW else partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
        near(context[:, :, 0], wanted[0].detach(), msg=f"{name}: context")
        near(sums[:, 0], wanted[1].detach(), msg=f"{name}: sums")
        near(grad_q.transpose(0, 1), q.grad, msg=f"{name}: queries")
        near(grad_x[:, :, 0], x.grad, msg=f"{name}: states")


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 16), (37, 48), (64, 384)])
def test_dropout_residual_and_norm_with_gradients(compiled, seeded, rows, hidden, p):
    torch.manual_seed(rows)
    residual, gain, bias = torch.randn(rows, hidden) + 2, torch.randn(hidden), torch.randn(hidden)
    x, more, grad = torch.randn(rows, hidden).to(LOW), torch.randn(rows, hidden).to(LOW), torch.randn(rows, hidden)
    keep = kept(rows * hidden, p).view(rows, hidden)
    exact = [t.double().requires_grad_() for t in (residual, x, gain, bias)]
    total = exact[0] + exact[1] * keep
    wanted = torch.nn.functional.layer_norm(total, [hidden], exact[2], exact[3], 1e-12)

    wide, low, saved = compiled.add_norm(residual, x, p, gain, bias, 1e-12, True)
    assert torch.allclose(wide.double(), wanted, atol=2e-5) and torch.equal(low, wide.to(LOW))
    unsaved = compiled.add_norm(residual, x, p, gain, bias, 1e-12, False)
    assert torch.equal(unsaved[0], wide) and all(t is None for t in unsaved[2].tensors[:3])
    narrow, same, _ = compiled.add_norm(residual.to(LOW), x, p, gain.to(LOW), bias.to(LOW), 1e-12, False)
    assert narrow is same
    close(narrow, wanted.detach(), "narrow residual")

    for extra in (None, more):
        for t in exact:
            t.grad = None
        wanted.backward(grad.double() + (0 if extra is None else extra.double()), retain_graph=True)
        found = compiled.add_norm_backward(saved, grad, extra)
        for got, leaf, name in zip(found, exact, ("residual", "x", "gain", "bias"), strict=True):
            close(got, leaf.grad, name)


def test_gelu_and_its_gradient_for_every_bfloat16(compiled):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(LOW)[:-3]
    exact = x.double().requires_grad_()
    wanted = torch.nn.functional.gelu(exact)
    wanted.sum().backward()
    y, saved = compiled.gelu(x, True)
    slope = compiled.gelu_backward(saved, torch.ones_like(x))
    equal = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
    equal(y, wanted.detach().to(LOW))
    equal(slope, exact.grad.to(LOW))
    unsaved = compiled.gelu(x, False)
    equal(unsaved[0], y)
    assert unsaved[1].tensors == [None]


def test_nan_propagates(compiled):
    qkv = torch.randn(1, 20, 3, 2, 32).to(LOW)
    qkv[0, 3, 1, 0, 5] = float("nan")  # a key: every query of that head meets it
    context, _, saved = compiled.attend(*qkv.unbind(2), None, 1.0, 0.1)
    into = torch.empty_like(qkv)
    compiled.attend_backward(saved, torch.ones_like(context), None, into.unbind(2))
    assert context[:, :, 0].isnan().all() and not context[:, :, 1].isnan().any() and into.isnan().any()
    x = torch.zeros(2, 32, dtype=LOW)
    x[1, 7] = float("nan")
    wide, low, _ = compiled.add_norm(torch.zeros(2, 32), x, 0.0, torch.ones(32), torch.zeros(32), 1e-12, True)
    assert wide[1].isnan().all() and low[1].isnan().all() and not wide[0].isnan().any()


def test_the_number_of_threads_changes_nothing(compiled, seeded):
    torch.manual_seed(2)
    qkv, grad = torch.randn(5, 19, 3, 3, 32).to(LOW), torch.randn(95, 96)
    gain, bias, residual, x = torch.ones(96), torch.zeros(96), torch.randn(95, 96), torch.randn(95, 96).to(LOW)
    before, found, sums = torch.get_num_threads(), [], []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            context, shares, attended = compiled.attend(*qkv.unbind(2), None, 1.0, 0.1)
            into_qkv = torch.empty_like(qkv)
            compiled.attend_backward(
                attended, grad.to(LOW).view(context.shape), shares.contiguous(), into_qkv.unbind(2)
            )
            wide, _, normed = compiled.add_norm(residual, x, 0.1, gain, bias, 1e-12, True)
            into, grad_x, *of_parameters = compiled.add_norm_backward(normed, grad)
            found.append((context, into_qkv, wide, into, grad_x))
            sums.append(torch.cat(of_parameters))  # by thread
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert all(torch.allclose(sums[0], other, rtol=1e-5, atol=1e-5) for other in sums[1:])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_uniform_and_follows_the_seed_of_torch(compiled, p):
    ones, nothing = torch.ones(4096, 256, dtype=LOW), torch.zeros(4096, 256)

    def masks(seed):
        torch.manual_seed(seed)
        wide, _, saved = compiled.add_norm(nothing, ones, p, torch.ones(256), torch.zeros(256), 1.0, True)
        assert wide is not None
        return saved.tensors[0] > 0

    first, again, other = masks(1), masks(1), masks(2)
    assert torch.equal(first, again)
    sigma = (p * (1 - p) / first.numel()) ** 0.5
    assert abs(first.double().mean() - (1 - p)) < 4 * sigma
    for a, b in ((first, other), (first[:, 1:], first[:, :-1]), (first[1:], first[:-1])):  # seeds, columns, rows
        both = (a & b).double().mean()
        assert abs(both - (1 - p) ** 2) < 4 * ((1 - p) ** 2 * (1 - (1 - p) ** 2) / a.numel()) ** 0.5


@pytest.mark.parametrize("last", [False, True])
def test_a_layer_with_dropout_and_its_gradient(seeded, last):
    """Through the model, against the formula with the same elements dropped; the last layer has the first token alone."""
    torch.manual_seed(6)
    B, L, H, p = 3, 21, 32, 0.2
    config = BertConfig(vocab_size=60, hidden_size=H, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                        hidden_dropout_prob=p, attention_probs_dropout_prob=p)  # fmt: skip
    encoder = Encoder(AutoModelForSequenceClassification.from_config(config))
    layer = encoder.model.bert.encoder.layer[-1 if last else 0].train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    queries = 1 if last else L
    hidden, grad = torch.randn(B, L, H), torch.randn(B, queries, H)
    mine = hidden.clone().requires_grad_()
    with torch.autocast("cpu", LOW):
        out = layer(mine, None)
    out.backward(grad)

    exact = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    its = hidden.double().requires_grad_()

    def linear(name, x):
        return torch.nn.functional.linear(x, exact[f"{name}.weight"], exact[f"{name}.bias"])

    def normed(name, x):
        return torch.nn.functional.layer_norm(x, [H], exact[f"{name}.weight"], exact[f"{name}.bias"], 1e-12)

    keys = -(-L // 16) * 16
    of_shares = kept(B * 2 * queries * keys, p).view(B, 2, queries, keys)[..., :L]
    of_states = kept(B * queries * H, p).view(B * queries, H)
    x = its.view(B * L, H)
    qkv = torch.stack([linear(f"attention.self.{name}", x) for name in ("query", "key", "value")], 1)
    context = attention(qkv.view(B, L, 3, 2, H // 2), None, of_shares, queries)
    x = its[:, :queries].reshape(-1, H)
    first = normed("attention.output.LayerNorm", x + linear("attention.output.dense", context) * of_states)
    inner = torch.nn.functional.gelu(linear("intermediate.dense", first))
    wanted = normed("output.LayerNorm", first + linear("output.dense", inner) * of_states).view(B, queries, H)
    wanted.backward(grad.double())

    def near(got, wanted, what):
        error = ((got.double() - wanted).norm() / wanted.norm()).item()
        assert error < 0.02, f"{what}: {error}"

    near(out.detach(), wanted.detach(), "output")
    near(mine.grad, its.grad, "hidden")
    for name, parameter in layer.named_parameters():
        if name != "attention.self.key.bias":  # its gradient is 0
            near(parameter.grad, exact[name].grad, name)


def test_a_compiled_model_is_as_accurate_as_autocast():
    torch.manual_seed(4)
    config = BertConfig(vocab_size=60, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    plain = AutoModelForSequenceClassification.from_config(config)
    assert isinstance(select_operations(LOW, torch.float32, 64, 32, True), CompiledOperations)
    inputs = {"input_ids": torch.randint(1, 60, (4, 21)), "attention_mask": torch.ones(4, 21, dtype=torch.int64)}
    inputs["attention_mask"][1:3, 9:] = 0

    def gradients(model, autocast):
        with torch.autocast("cpu", LOW, enabled=autocast):
            logits = model(**inputs).logits if model is not fused else fused(inputs)[0]
        logits.double().square().sum().backward()
        named = (model if model is not fused else fused.model).named_parameters()
        return {name: p.grad.double() for name, p in named if p.grad is not None}

    exact, low, fused = copy.deepcopy(plain).double(), copy.deepcopy(plain), Encoder(copy.deepcopy(plain))
    wanted, usual, ours = gradients(exact, False), gradients(low, True), gradients(fused, True)

    def error(found):
        return sum((found[n] - g).norm() ** 2 for n, g in wanted.items()) ** 0.5

    assert error(ours) < 1.2 * error(usual)


def compiler_that(tmp_path, does):
    """A script that replaces the compiler."""
    script = tmp_path / "cc"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No compiler and no cache except those of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native.log, "propagate", True)
    return tmp_path


FAILS = 'case "$*" in *-dM*) echo target;; *) echo "kernels.c: In function"; echo "kernels.c:1: error: no such thing" >&2; exit 1;; esac'


@pytest.mark.parametrize(
    ("does", "logged"),
    [
        (None, "no C compiler found"),
        (FAILS, "cc failed: kernels.c:1: error: no such thing"),
        ("exit 3", "cc failed: no output"),
        ("exit 0", "cannot open shared object file"),
    ],
)
def test_without_a_compiler_pytorch_is_used_and_the_log_says_why(monkeypatch, alone, caplog, does, logged):
    if does:
        monkeypatch.setenv("CC", compiler_that(alone, does))
    with caplog.at_level(logging.INFO, "pkd"):
        assert native.load_kernels.__wrapped__() is None
    assert logged in caplog.text and "PyTorch's operations" in caplog.text
    assert not list(alone.rglob("kernels*"))


def test_a_cache_folder_that_others_can_write_is_not_used(monkeypatch, alone, caplog):
    monkeypatch.setenv("CC", compiler_that(alone, "echo target"))
    (alone / "cache" / "pkd_dist").mkdir(parents=True)
    (alone / "cache" / "pkd_dist").chmod(0o777)
    with caplog.at_level(logging.INFO, "pkd"):
        assert native.load_kernels.__wrapped__() is None
    assert "can be written by others" in caplog.text


def test_the_cache_folder_of_another_user_is_not_used(monkeypatch, alone, caplog):
    """As root, the folder is given to another user; otherwise, root's own stands in for it."""
    monkeypatch.setenv("CC", compiler_that(alone, "echo target"))
    folder = alone / "cache" / "pkd_dist"
    folder.mkdir(mode=0o700, parents=True)
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
    else:
        monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    with caplog.at_level(logging.INFO, "pkd"):
        assert native.load_kernels.__wrapped__() is None
    assert f"{folder} can be written by others" in caplog.text


def test_without_a_cache_folder_the_kernels_are_built_for_the_process(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/read-only")
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path))
    assert native.load_kernels.__wrapped__() is not None and not any(tmp_path.iterdir())


def test_an_environment_variable_turns_the_kernels_off(monkeypatch):
    monkeypatch.setenv("PKD_KERNELS", "0")
    assert native.load_kernels.__wrapped__() is None


def test_pytorch_is_used_for_unsupported_layers(monkeypatch):
    assert isinstance(select_operations(LOW, torch.float32, 64, 32, True), CompiledOperations)
    assert isinstance(select_operations(LOW, LOW, 64, 32, False), CompiledOperations)
    for low, wide, hidden, head, needs_grad in (
        (LOW, LOW, 64, 32, True), (LOW, torch.float32, 32, 8, True), (torch.float32, torch.float32, 64, 32, True),
        (torch.float16, torch.float32, 64, 32, True), (torch.float64, torch.float64, 64, 32, False),
    ):  # fmt: skip
        assert isinstance(select_operations(low, wide, hidden, head, needs_grad), TorchOperations)
    monkeypatch.setattr("pkd_dist.kernels.operations.load_kernels", lambda: None)
    assert isinstance(select_operations(LOW, torch.float32, 64, 32, True), TorchOperations)


def test_tensors_that_a_kernel_cannot_read_are_rejected(compiled):
    qkv = torch.randn(2, 5, 3, 2, 16).to(LOW)
    one = torch.zeros(1, 1, 5, dtype=LOW)
    q, k, v = qkv.unbind(2)
    assert torch.equal(
        compiled.attend(q, k, v, one, 1.0, 0.0)[0], compiled.attend(q, k, v, None, 1.0, 0.0)[0]
    )  # for all
    with pytest.raises(TypeError, match="cannot read"):
        compiled.attend(q.float(), k, v, None, 1.0, 0.0)
    with pytest.raises(TypeError, match="cannot read"):
        compiled.attend(q, k.transpose(2, 3), v, None, 1.0, 0.0)
    with pytest.raises(TypeError, match="cannot read"):
        compiled.attend(q, k[:, :, :1].expand(k.shape), v, None, 1.0, 0.0)


def test_kernels_are_built_once_and_rebuilt_if_the_file_is_damaged(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    old = tmp_path / "pkd_dist" / "kernels-old.so"
    old.parent.mkdir(mode=0o700)
    old.touch()
    os.utime(old, (0, 0))
    assert native.load_kernels.__wrapped__() is not None
    (library,) = (tmp_path / "pkd_dist").iterdir()
    made = library.stat().st_mtime_ns
    assert native.load_kernels.__wrapped__() is not None and library.stat().st_mtime_ns == made
    intact = library.read_bytes()
    for number, damaged in enumerate((b"", intact[:4096], intact[: len(intact) // 2], intact[:-1])):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(number)))  # a loaded path is not read again
        broken = tmp_path / str(number) / "pkd_dist" / library.name
        broken.parent.mkdir(mode=0o755, parents=True)
        broken.write_bytes(damaged)
        assert native.load_kernels.__wrapped__() is not None
        assert [*broken.parent.iterdir()] == [broken] and native._is_sealed(broken)
        assert broken.parent.stat().st_mode & 0o777 == 0o700
