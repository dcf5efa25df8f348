"""Parts of the benchmarks: spans, watching a process, groups of operations, ratios, and the page of performance."""

import json
import sys
import time
from types import SimpleNamespace

import pytest

from benchmarks import common, performance, watch
from benchmarks.peers import collect
from benchmarks.profile import groups
from benchmarks.scaling.memory import multiply
from benchmarks.scaling.startup import by_package
from benchmarks.spans import Spans
from benchmarks.watch import is_rank
from pkd_dist.config.task import Task as TaskConfig
from pkd_dist.data import tasks, text


def test_a_second_counts_once_for_the_innermost_span(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    spans = Spans()

    def passes(seconds):
        now[0] += seconds

    passes(1)
    with spans.span("outer"):
        passes(2)
        with spans.span("inner"):
            passes(4)
        passes(8)
        spans.wrapped(passes, "inner")(16)
        spans.wrapped(passes, "outer")(32)
        assert spans.finished() == {"outer": 42, "inner": 20}
    spans.clear()
    with pytest.raises(KeyError), spans.span("outer"):
        passes(1)
        raise KeyError
    passes(100)
    assert spans.finished() == {"outer": 1}, "what raises ends its span"


def test_a_process_is_watched(tmp_path):
    code = "import time; held = bytearray(b'x') * (200 << 20); time.sleep(1); print(len(held))"
    looks = []
    watched = watch.run(
        [sys.executable, "-c", code], tmp_path / "log", interval_seconds=0.05, stop_when=lambda: looks.append(1)
    )
    (found,) = watched.memory.values()
    assert watched.status == 0 and (tmp_path / "log").read_text() == f"{200 << 20}\n" and looks and not watched.stopped
    assert found.command.startswith(sys.executable) and 1 <= watched.seconds < 60
    assert 200 << 20 <= found.anonymous < 260 << 20
    assert found.peak >= found.anonymous and watched.peak_bytes == found.peak
    assert watch.run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log").status == 3


@pytest.mark.parametrize(
    ("name", "parents", "phase", "group"),
    [
        ("aten::addmm", ["aten::linear"], "forward", groups.GEMM),
        ("aten::bmm", ["aten::_scaled_dot_product_attention_math"], "forward", groups.ATTENTION),
        ("aten::mul", ["aten::_scaled_dot_product_attention_math"], "forward", groups.ATTENTION),
        ("aten::_softmax", [], "loss", groups.OTHER),
        ("aten::bernoulli_", ["aten::native_dropout"], "forward", groups.DROPOUT),
        ("aten::native_layer_norm", [], "forward", groups.NORM),
        ("aten::gelu_backward", [], "backward", groups.ACTIVATION),
        ("aten::copy_", ["aten::_to_copy", "aten::to"], "forward", groups.CASTS),
        ("aten::copy_", [], "engine step", groups.COPIES),
        ("aten::zero_", [], "engine step", groups.FILLS),
        ("aten::_fused_adamw_", [], "engine step", groups.OPTIMIZER),
        ("aten::linalg_vector_norm", [], "engine step", groups.CLIPPING),
        ("aten::mul_", [], "engine step", groups.CLIPPING),
        ("aten::mul_", [], "backward", groups.OTHER),
        ("c10d::allreduce_", [], "backward", groups.COMMUNICATION),
    ],
)
def test_operations_have_a_group(name, parents, phase, group):
    assert groups.of_operation(name, parents, phase) == group


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", groups.GEMM),
        ("nvjet_tst_128x64_64x8_1x2_h_bz_TNN", groups.GEMM),
        ("void pytorch_flash::flash_fwd_kernel<...>", groups.ATTENTION),
        ("void at::native::(anonymous namespace)::fused_dropout_kernel_vec<float>", groups.DROPOUT),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", groups.NORM),
        ("void at::native::unrolled_elementwise_kernel<at::native::bfloat16_copy_kernel_cuda>", groups.CASTS),
        ("Memcpy HtoD (Pinned -> Device)", groups.COPIES),
        ("Memset (Device)", groups.FILLS),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", groups.COMMUNICATION),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>", groups.OPTIMIZER),
        ("void at::native::multi_tensor_apply_kernel<LpNormFunctor<float>>", groups.CLIPPING),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", groups.ACTIVATION),
        ("void at::native::indexSelectLargeIndex<float>", groups.OTHER),
    ],
)
def test_kernels_have_a_group(name, group):
    assert groups.of_kernel(name) == group


def test_many_times_the_data_are_as_many_different_examples(data, tmp_path):
    multiply(data, tmp_path, 3)
    task = tasks.resolve(TaskConfig(data=str(tmp_path)))
    once, thrice = (text.read(str(folder), "train", task) for folder in (data, tmp_path))
    assert len(thrice) == 3 * len(once) and list(once.ids_N) == list(thrice.ids_N[: len(once)])
    assert len(set(thrice.ids_N.tolist())) == len(thrice)
    pairs = list(zip(once.texts[0], thrice.texts[0][len(once) : 2 * len(once)], strict=True))
    assert all(sum(a != b for a, b in zip(x.split(), y.split(), strict=True)) <= 1 for x, y in pairs)
    assert sum(x != y for x, y in pairs) > 0.8 * len(pairs)
    assert (tmp_path / "dev.tsv").read_bytes() == (data / "dev.tsv").read_bytes()


def test_ranks_are_told_from_their_launchers():
    assert is_rank("/venv/bin/python -u /p/launcher/train.py --local_rank=0 --config x")
    assert is_rank("/venv/bin/python /p/launcher/train.py --config x")
    assert not is_rank("/venv/bin/python /venv/bin/deepspeed --num_accelerators 2 /p/launcher/train.py")
    assert not is_rank("/venv/bin/python -u -m deepspeed.launcher.launch --x /p/launcher/train.py")
    assert not is_rank("/venv/bin/python -m torch.distributed.run /p/launcher/train.py")


def test_import_times_by_package():
    log = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:      1000 |       1000 |     torch._C\n"
        "import time:    500000 |     501000 |   torch\n"
        "data: done\n"
        "import time:      2000 |     503000 | numpy.linalg\n"
    )
    assert by_package(log) == {"torch": 0.501, "numpy": 0.002}


def of_epochs(*accuracies):
    return {"epochs": [{"accuracy": accuracy} for accuracy in accuracies]}


def test_the_time_to_quality_is_that_of_the_first_epoch_with_the_agreement():
    def run(began, pace, *agreements):
        epochs = [{"agreement": a, "accuracy": 0.5, "at": began + n * pace} for n, a in enumerate(agreements, 1)]
        return {"began": began, "epochs": epochs}

    files = {
        "hf-float32": [run(0, 100, 0.7, 0.85), run(1000, 120, 0.8, 0.95)],
        "ours-python": [run(50, 10, 0.92, 0.8, 0.9), run(80, 20, 0.82, 0.84, 1.0)],
        "textbrewer-dynamic": [run(0, 500, 0.8, 0.8)],
    }
    bench = SimpleNamespace(seeds=(1, 2), file=lambda name, seed, full: Stored(files.get(name, ())[seed - 1 : seed]))
    found = collect._time_to_quality(bench, "hf-float32")["time_to_quality"]
    assert found["agreement"] == pytest.approx(0.9)
    seconds = {name: reached["seconds"] for name, reached in found["reached"].items()}
    assert seconds == {"hf-float32": 220, "ours-python": 45, "textbrewer-dynamic": None}
    assert [epoch["agreement"] for epoch in found["reached"]["ours-python"]["epochs"]] == pytest.approx(
        [0.87, 0.82, 0.95]
    )
    assert collect._time_to_quality(bench, None) == {}


class Stored:
    """A file of a measurement, or none."""

    def __init__(self, runs):
        self._runs = runs

    def exists(self):
        return bool(self._runs)

    def read_text(self):
        return json.dumps(self._runs[0])


def made(role, seconds, accuracies=(), training=10.0, flops=0.0):
    return {"role": role, "seconds": seconds, "training_seconds": training, "executed_training_flops": flops,
            "precision": "bfloat16", **collect._accuracy({seed: of_epochs(0.1, a) for seed, a in enumerate(accuracies, 1)})}  # fmt: skip


def test_ratios_are_those_of_our_best_way_to_the_fastest_of_each_kind():
    contestants = {
        "a": made("authors", 1000, (0.8,)),
        "slow": made("peer", 600), "fast": made("peer", 200, (0.84, 0.84)),
        "one": made("ours", 50, (0.83, 0.85), flops=30.0), "two": made("ours", 40, (0.83, 0.85), flops=40.0),
    }  # fmt: skip
    found = collect._ratios(contestants, {"bfloat16": 8.0})
    assert (found["best_ours"], found["best_peer"]) == ("two", "fast")
    assert (found["ratio_best_peer"], found["ratio_authors"]) == (5, 25)
    assert found["gemm_share"] == 40 / 10 / 8
    assert found["accuracy_holds"] and found["accuracy_ahead"]["fast"] == pytest.approx(0)
    contestants["fast"] = made("peer", 200, (0.86, 0.86))
    assert not collect._ratios(contestants, {})["accuracy_holds"], "2 points ahead, and our error is 1"
    assert "gemm_share" not in collect._ratios(contestants, {})
    difference = collect._ratios(contestants, {})["accuracy_difference"]
    assert difference["seeds"] == [1, 2]
    assert (difference["mean"], difference["error"]) == pytest.approx((0.02, 0.01))
    contestants["fast"]["accuracies"] = {2: 0.9, 3: 0.1}
    assert "accuracy_difference" not in collect._ratios(contestants, {}), "one seed in common"
    assert collect._ratios({"a": contestants["a"]}, {}) == {}


def test_an_accuracy_is_the_mean_of_best_epochs_with_its_standard_error():
    found = collect._accuracy({1: of_epochs(0.8, 0.7), 2: of_epochs(0.7, 0.9)})
    assert found["accuracy"] == pytest.approx(0.85)
    assert found["accuracy_error"] == pytest.approx(0.05)  # 0.0707 over the root of 2
    assert collect._accuracy({1: of_epochs(0.8)})["accuracy_error"] is None


def test_the_page_says_what_is_measured():
    text = performance.PAGE.read_text(encoding="utf-8")
    assert text == common.filled(performance.PAGE, performance.figures(performance.read())), (
        "run: python -m benchmarks.performance"
    )


def test_a_page_of_nothing_says_so(tmp_path):
    (tmp_path / "peers.json").write_text(json.dumps({"contestants": {}}))
    text = common.filled(performance.PAGE, performance.figures(performance.read(tmp_path)))
    for command in performance.COMMANDS.values():
        assert f"Not measured yet: `{command}`" in text
