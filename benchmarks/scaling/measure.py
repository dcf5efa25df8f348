"""Measures the constants of this machine that the model and docs/scaling.md rest on.

    python -m benchmarks.scaling.measure [--only machine,collectives,counts,steps,counted,storage,host,teacher]

Writes benchmarks/results/scaling_constants.json; `--only` replaces the parts named and leaves the others. Other work
may share the machine. So a rank has one thread, and what one process does alone is given in its own processor seconds,
the least of several tries, which waiting for a core does not change; where ranks wait for each other it is the least
wall time. Each part says how contended the cores were meanwhile (`waiting_share`: of the time, some task waited).
"""

from __future__ import annotations

import argparse
import datetime
import json
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.scaling.model import minilm
from benchmarks.watch import processor, waited_seconds

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "scaling_constants.json"
ROWS, LENGTH = 32, 32
"""Of a micro-batch of one rank in the timed steps."""


def least_seconds(call: Callable[[], Any], tries: int) -> float:
    """Processor seconds of this process."""
    call()
    seconds = []
    for _ in range(tries):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


def torchrun(module: str, ranks: int, *arguments: str) -> Any:
    """The last line of JSON that a module prints under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for _ in range(2):  # two-rank runs of stage 3 have been seen to abort after their work was done
        done = subprocess.run(
            [*command, f"benchmarks.scaling.{module}", *arguments],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith(("{", "["))]
        if lines:
            return json.loads(lines[-1])
    raise RuntimeError(done.stdout + done.stderr)


# ------------------------------------------------------------------------------------------------- processor and memory


def machine() -> dict[str, Any]:
    """Products and memory bandwidth of one core, and the time to start an operation."""
    torch.set_num_threads(1)
    products = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(1024, 384, dtype=dtype), torch.randn(384, 1536, dtype=dtype)
        seconds = least_seconds(lambda a=a, b=b: [a @ b for _ in range(5)], 30) / 5
        products[str(dtype).removeprefix("torch.")] = 2 * 1024 * 384 * 1536 / seconds
    x, y = torch.ones(1 << 25), torch.ones(1 << 25)
    one = torch.ones(1, requires_grad=True)
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "product_flops_per_second": products,
        "memory_bytes_per_second": 3 * x.numel() * 4 / least_seconds(lambda: x.add_(y), 15),
        "operation_seconds": least_seconds(lambda: [one * one for _ in range(1000)], 20) / 1000,
    }


def collectives() -> dict[str, Any]:
    """gloo over the loopback interface. Four ranks share two cores."""
    return {f"{ranks} ranks": torchrun("collectives_worker", ranks) for ranks in (2, 4)}


# ------------------------------------------------------------------------------------------------------ training steps


def counts() -> dict[str, float]:
    """Bytes and operations of a forward and backward pass under bfloat16 autocast, from differences between shapes."""
    from benchmarks.scaling.counting import StepCounter, saved_for_backward
    from benchmarks.scaling.step_worker import make_inputs, make_model
    from pkd_dist.distillation.losses import hard_loss
    from pkd_dist.model.encoder import Encoder

    def count(layers: int, rows: int) -> np.ndarray:
        encoder = Encoder(make_model(minilm(layers))).train()
        inputs, labels_B = make_inputs(rows, LENGTH, 30522)
        with StepCounter() as counter:
            with saved_for_backward() as saved, torch.autocast("cpu", torch.bfloat16):
                loss = hard_loss(encoder(inputs)[0], labels_B).mean()
            loss.backward()
        return np.array([counter.traffic_bytes, saved[0], counter.operations], dtype=float)

    low, high = 8, 24
    at = {(layers, rows): count(layers, rows) for layers in (3, 6) for rows in (low, high)}
    unit = (high - low) * LENGTH * 384
    slope3, slope6 = (at[3, high] - at[3, low]) / unit, (at[6, high] - at[6, low]) / unit
    layer = (slope6 - slope3) / 3
    rest = slope3 - 2 * layer
    fixed = at[3, low][0] - slope3[0] * low * LENGTH * 384
    return {
        "traffic_per_layer": layer[0],
        "traffic_rest": rest[0],
        "traffic_per_parameter": fixed / minilm(3).parameters,
        "saved_per_layer": layer[1],
        "saved_rest": rest[1],
        "operations": at[3, low][2],
        "operations_per_layer": (at[6, low][2] - at[3, low][2]) / 3,
    }


STAGES = [f"zero{stage}" for stage in range(4)]


def steps() -> list[dict[str, Any]]:
    """Steps through the engine, timed and counted, at 1 and 2 ranks."""
    return _run([(name, ranks, 3, ROWS, 12, 1) for ranks in (1, 2) for name in STAGES])


def counted() -> list[dict[str, Any]]:
    """Small steps of other precisions, numbers of ranks and of micro-batches, for what they keep and send alone."""
    plan = [(name, 4, 3, 2, 1, 1) for name in STAGES] + [(name, 2, 3, 2, 1, 2) for name in STAGES]
    return _run([*plan, *((f"{name}_bf16", 2, 3, 2, 1, 1) for name in STAGES), ("zero3", 2, 6, 2, 1, 1)])


def _run(plan: list[tuple[str, int, int, int, int, int]]) -> list[dict[str, Any]]:
    """Each: configuration, ranks, layers, rows, steps timed, micro-batches."""
    out = []
    for name, ranks, layers, rows, timed, accumulation in plan:
        arguments = {
            "deepspeed": f"ds_configs/{name}.json", "shape": asdict(minilm(layers)), "rows": rows, "length": LENGTH,
            "steps": timed, "accumulation": accumulation,
        }  # fmt: skip
        result = torchrun("step_worker", ranks, json.dumps(arguments))
        settings = {"config": name, "ranks": ranks, "layers": layers, "rows": rows, "accumulation": accumulation}
        out.append(settings | result)
        print(out[-1], flush=True)
    return out


# ---------------------------------------------------------------------------------------------------- storage and host


def _cold(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _device_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


def storage() -> dict[str, Any]:
    """Cold reads of a file of 3 GiB: in order, whole shards at random, rows of 3 KiB at random through a memory map."""
    size, shard, row, tries = 3 << 30, 4096 * 3072, 3072, 1500
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        path = Path(folder) / "rows"
        with open(path, "wb") as file:
            for _ in range(size >> 26):
                file.write(rng.bytes(1 << 26))

        def in_order() -> int:
            with open(path, "rb", buffering=0) as file:
                return sum(len(block) for block in iter(lambda: file.read(1 << 24), b""))

        def shards() -> int:
            with open(path, "rb", buffering=0) as file:
                for k in rng.choice(size // shard, 100, replace=False):
                    file.seek(int(k) * shard)
                    file.read(shard)
            return 100 * shard

        def rows(advice: int) -> int:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                view.madvise(advice)
                for k in rng.choice(size // row, tries, replace=False):
                    bytes(view[int(k) * row : int(k) * row + row])
            return tries * row

        out: dict[str, Any] = {"file_bytes": size, "row_bytes": row, "shard_bytes": shard}
        for name, read in {
            "in_order": in_order,
            "random_shards": shards,
            "random_rows": lambda: rows(mmap.MADV_NORMAL),
            "random_rows_without_read_ahead": lambda: rows(mmap.MADV_RANDOM),
        }.items():
            _cold(path)
            before, start = _device_bytes(), time.perf_counter()
            wanted = read()
            seconds = time.perf_counter() - start
            out[name] = {
                "bytes_per_second": wanted / seconds,
                "device_bytes_per_byte_wanted": (_device_bytes() - before) / wanted,
                "rows_per_second": wanted / row / seconds,
            }
        out["read_ahead_bytes"] = _read_ahead(path)
    return out


def _read_ahead(path: Path) -> int | None:
    device = os.stat(path).st_dev
    found = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for place in (found, found.parent):
        if (place / "queue" / "read_ahead_kb").is_file():
            return int((place / "queue" / "read_ahead_kb").read_text()) * 1024
    return None


def host() -> dict[str, Any]:
    """What one rank's main thread does for a batch, all in memory: cache rows and collation; and what a shard costs.
    Rows per processor second."""
    from safetensors.torch import save_file

    from pkd_dist.data.batches import collate
    from pkd_dist.data.tokens import TokenSet
    from pkd_dist.distillation.cache import FORMAT_VERSION, MANIFEST, CacheReader, Fingerprint, shard_name
    from pkd_dist.files import sha256, write_json

    torch.set_num_threads(1)
    shards, shard_rows, pairs, hidden = 512, 128, 2, 768
    n = shards * shard_rows
    rng = np.random.default_rng(0)
    ids = np.sort(rng.choice(1 << 62, n, replace=False))
    fingerprint = Fingerprint("t", "k", "d", 128, (4, 8), "float16", "float16", "cls")
    out: dict[str, Any] = {"shards": shards, "shard_rows": shard_rows, "pairs": pairs, "hidden": hidden, "rows_of": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder, entries = Path(scratch), []
        for s in range(shards):
            part = ids[s * shard_rows : (s + 1) * shard_rows]
            path = folder / shard_name(s)
            tensors = {
                "ids": torch.from_numpy(part),
                "logits": torch.zeros(shard_rows, 2, dtype=torch.float16),
                "states": torch.zeros(shard_rows, pairs, hidden, dtype=torch.float16),
            }
            save_file(tensors, path)
            entries.append(
                {"file": path.name, "rows": shard_rows, "bytes": path.stat().st_size, "sha256": sha256(path),
                 "first_id": int(part[0]), "last_id": int(part[-1])}
            )  # fmt: skip
        manifest = {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint.as_json(),
            "rows": n,
            "shards": entries,
        }
        write_json(folder / MANIFEST, manifest)
        before = _open_files(), _mappings()
        reader = CacheReader(folder, fingerprint, ())
        out["open_files_per_shard"] = (_open_files() - before[0]) / shards
        out["mappings_per_shard"] = (_mappings() - before[1]) / shards
        reader.rows_of(ids, LENGTH)  # every page is in memory now
        for rows in (64, 512):
            scattered = [rng.choice(ids, rows, replace=False) for _ in range(20)]
            together = [ids[k * shard_rows : k * shard_rows + rows] for k in range(20)]
            for name, batches in (("scattered", scattered), ("adjacent", together)):
                seconds = least_seconds(lambda batches=batches: [reader.rows_of(b, LENGTH) for b in batches], 5)
                out["rows_of"][f"{rows} rows, {name}"] = 20 * rows / seconds
    lengths = rng.integers(8, 48, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    flat = rng.integers(1, 30000, offsets[-1]).astype(np.int32)
    tokens = TokenSet(flat, None, offsets, ids, rng.integers(2, size=n), "", "", 0)
    pick = rng.permutation(n)[:64]
    weight = np.full(64, 1 / 64)
    out["collate_rows_per_second"] = 64 / least_seconds(lambda: collate(tokens, pick, weight, 0), 50)
    return out


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _mappings() -> int:
    return Path("/proc/self/maps").read_text().count("\n")


class StubTeacher:
    """Answers at once: what is left of a build is the host's part."""

    tokens, device = False, torch.device("cpu")

    def __init__(self, pairs: int, hidden: int):
        self.pairs, self.hidden = pairs, hidden

    def unchecked(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(inputs["input_ids"])
        half = torch.float16
        return torch.zeros(rows, 2, dtype=half), torch.zeros(rows, self.pairs, self.hidden, dtype=half)


def teacher() -> dict[str, Any]:
    """The project's own stages on the embedded data, one core: text to tokens, and the cache of a 6-layer MiniLM.
    Rows per processor second."""
    from pkd_dist.config.load import load
    from pkd_dist.data import tasks, text, tokens
    from pkd_dist.data.examples import Split
    from pkd_dist.distillation.cache import Fingerprint
    from pkd_dist.distillation.cache_builder import LiveTeacher, build
    from pkd_dist.distributed.ranks import discover
    from pkd_dist.distributed.world import World
    from pkd_dist.model import encoder
    from pkd_dist.telemetry import Telemetry
    from pkd_dist.telemetry.metrics import RunMetrics

    config = load(ROOT / "configs" / "demo.yaml", [])
    base = encoder.locate(config.teacher.model)
    tokenizer = encoder.load_tokenizer(base)
    world, out = World(discover(), 60), {}
    telemetry = Telemetry(RunMetrics(), False)
    with tempfile.TemporaryDirectory() as scratch:
        start = time.process_time()
        split = text.read(config.task.data, "train", tasks.resolve(config.task), None)
        out["read_rows_per_second"] = len(split) / (time.process_time() - start)
        start = time.process_time()
        made = tokens.tokenize(split, tokenizer, config.task.max_length, Path(scratch) / "tokens")
        out["tokenize_rows_per_second"] = len(made) / (time.process_time() - start)
        out |= {"rows": len(made), "mean_length": float(made.lengths_N.mean())}
        out["length_deciles"] = np.quantile(made.lengths_N, np.arange(0, 1.01, 0.1)).tolist()
        torch.set_num_threads(1)
        part = Split(split.ids_N[:2048], tuple(c[:2048] for c in split.texts), split.labels_N[:2048], split.classes, "")
        some = tokens.tokenize(part, tokenizer, config.task.max_length, Path(scratch) / "some")
        model = encoder.load_model(base, new_head=True, num_labels=2)
        live = LiveTeacher(model, (2, 4), "bfloat16", "float16", False, world.device)
        for name, made_of, subject, pairs in (("minilm", live, some, 2), ("stub", StubTeacher(2, 768), made, 2)):
            layers = tuple(range(1, pairs + 1))
            print_of = Fingerprint(name, "k", "d", 128, layers, "float16", "bfloat16", "cls")
            folder = Path(scratch) / name
            start = time.process_time()
            build(folder, print_of, subject, lambda layers, made_of=made_of: made_of, 0, 4096, world, telemetry)
            out[f"build_{name}_rows_per_second"] = len(subject) / (time.process_time() - start)
            out[f"build_{name}_bytes_per_row"] = sum(p.stat().st_size for p in folder.glob("*.safetensors")) / len(
                subject
            )
            shutil.rmtree(folder)
    out["teacher_forward_flops_per_row"] = minilm(6).forward_flops(64, round(out["mean_length"])) / 64
    world.close()
    return out


PARTS: dict[str, Callable[[], Any]] = {
    "machine": machine, "collectives": collectives, "counts": counts, "steps": steps, "counted": counted,
    "storage": storage, "host": host, "teacher": teacher,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure, separated by commas")
    chosen = parser.parse_args().only.split(",")
    for name in chosen:
        start, waited = time.perf_counter(), waited_seconds()
        found = PARTS[name]()
        known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        known[name] = found
        known.setdefault("waiting_share", {})[name] = round(
            (waited_seconds() - waited) / (time.perf_counter() - start), 2
        )
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(known, indent=1) + "\n")
        print(name, "done", flush=True)


if __name__ == "__main__":
    main()
