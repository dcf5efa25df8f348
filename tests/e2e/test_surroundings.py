"""Whatever surrounds a run - closed output, small limits, variables left by other software - it ends with the same bytes."""

import os
import signal
import subprocess
import sys

import forked
import pytest
from conftest import ROOT, TO_EXPORT, environment, launch, started, until, whole_run, write_config

TRAIN = ROOT / "launcher/train.py"
BEFORE = "import os, resource, runpy, sys\n{}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
FILES = ("teacher/model.safetensors", "export/model.safetensors")


def brief(body, data, folder):
    settings = whole_run(body, data, folder)
    settings["train"]["epochs"] = settings["teacher"]["finetune"]["epochs"] = 1
    return write_config(settings, folder)


@pytest.fixture
def config(body, data, tmp_path):
    return brief(body, data, tmp_path)


@pytest.fixture(scope="module")
def without_asserts(body, data, tmp_path_factory):
    """The folder of a run of `python -O` that writes ONNX, and its home folder, which was empty."""
    folder = tmp_path_factory.mktemp("without-asserts")
    (home := folder / "home").mkdir()
    variables = {"PYTHONOPTIMIZE": "1", "HOME": str(home), "HF_HOME": str(folder)}
    done = launch_afresh("--config", brief(body, data, folder), 'export.formats=["onnx"]', **variables)
    assert done.returncode == 0, done.stderr
    return folder / "run", home


@pytest.fixture(scope="module")
def calm(body, data, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("calm")
    done = launch("--config", brief(body, data, folder), *TO_EXPORT)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def assert_same(run, calm, files=FILES):
    for name in files:
        assert (run / name).read_bytes() == (calm / name).read_bytes(), name


def after(preparation, folder):
    """Writes a program that does something first, and then is launcher/train.py."""
    program = folder / "program.py"
    program.write_text(BEFORE.format(f"sys.argv[0] = {str(TRAIN)!r}\n{preparation}"))
    return program


def launch_after(preparation, folder, *arguments, **variables):
    """Runs launcher/train.py in a process that has done something first."""
    return forked.run(after(preparation, folder), arguments, ROOT, [environment(**variables)], 120)


def launch_afresh(*arguments, program=TRAIN, **variables):
    """Runs launcher/train.py in a process that has loaded nothing: what counts is said while libraries are loaded."""
    argv, variables = [sys.executable, program, *arguments], environment(**variables)
    return subprocess.run(argv, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120, check=False)


OUTPUTS = {
    "closed": "for n in range(3): os.close(n)\nsys.stdin = sys.stdout = sys.stderr = None",
    "full": "for n in (1, 2): os.dup2(os.open('/dev/full', os.O_WRONLY), n)",
    "nobody reads": "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)",
}


@pytest.mark.parametrize("way", OUTPUTS)
def test_nobody_need_read_the_output(calm, config, tmp_path, way):
    done = launch_after(OUTPUTS[way], tmp_path, "--config", config)
    assert done.returncode == 0 and not done.stdout, (tmp_path / "run/logs/rank-0.log").read_text()
    assert_same(tmp_path / "run", calm)
    logged = (tmp_path / "run/logs/rank-0.log").read_text()
    assert "report: done" in logged and ("the rest of it is dropped" in logged) == (way != "closed")


def test_without_output_the_status_still_tells_of_an_error(config, tmp_path):
    done = launch_after(OUTPUTS["full"], tmp_path, "--config", config, "task.data=/nowhere")
    assert done.returncode == 2


def test_a_plan_that_cannot_be_printed_is_an_error(config, tmp_path):
    full = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    done = launch_after(full, tmp_path, "--config", config, "--dry-run")
    assert done.returncode == 2 and done.stderr.startswith("pkd: no space left on a disk or for the output (")


LEFT = {
    "WORLD_SIZE": "garbage", "MASTER_PORT": "garbage", "MASTER_ADDR": "nowhere.invalid",
    "GLOO_SOCKET_IFNAME": "ib9", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2",
    "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": "",
    "HOME": "/proc/read-only", "HF_HOME": "/proc/read-only", "TMPDIR": "/nowhere", "LC_ALL": "C", "COLUMNS": "0",
    "NO_COLOR": "1", "PYTORCH_ALLOC_CONF": "garbage", "HF_HUB_OFFLINE": "garbage",
}  # fmt: skip


def test_variables_of_other_software_and_a_low_limit_of_files(calm, body, data, tmp_path):
    folder = tmp_path / "дані"
    folder.mkdir()
    limit = after("resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))", tmp_path)
    done = launch_afresh("--config", brief(body, data, folder), program=limit, **LEFT)
    assert done.returncode == 0, done.stderr
    assert_same(folder / "run", calm)


def test_a_variable_that_torch_rejects_is_one_line(config):
    done = launch_afresh("--config", config, TORCH_DISTRIBUTED_DEBUG="garbage")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("pkd: PyTorch cannot be loaded: The value of TORCH_DISTRIBUTED_DEBUG must be ")


def test_python_without_asserts(calm, without_asserts):
    assert_same(without_asserts[0], calm)


def test_python_without_docstrings_is_rejected(config):
    done = launch_afresh("--config", config, PYTHONOPTIMIZE="2")
    assert done.returncode == 2 and done.stderr.startswith("pkd: Python runs without docstrings (-OO or PYTHONOPT")
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_onnx_runtime_sends_nothing_and_writes_nothing_at_home(without_asserts):
    run, home = without_asserts
    assert (run / "export/onnx/model.onnx").exists() and not list(home.rglob("*onnxruntime*"))


def test_a_lost_terminal_commits_and_the_same_command_ends_with_the_same_bytes(calm, config, tmp_path):
    run = tmp_path / "run"
    with started("--config", config, *TO_EXPORT) as [job]:
        until("metrics.jsonl:7", run, [job])
        job.send_signal(signal.SIGHUP)
        _, said = job.communicate(60)
    assert job.returncode == 75
    [line] = [line for line in said.splitlines() if line.startswith("pkd: ")]
    assert line.startswith("pkd: distill: stopped by SIGHUP; a checkpoint of step ")
    done = launch("--config", config, *TO_EXPORT)
    assert done.returncode == 0 and "distill: resuming from step" in done.stdout, done.stderr
    assert_same(run, calm)


TWICE = """
import sys
from pkd_dist.cli.launch import leave, train
config, *folders = sys.argv[1:]
leave(max([train(["--config", config, f"run.dir={folder}"]) for folder in folders]))
"""


def test_two_runs_one_after_another_in_one_process(calm, config, tmp_path):
    program = tmp_path / "twice.py"
    program.write_text(TWICE)
    folders = tmp_path / "first", tmp_path / "second"
    done = forked.run(program, [config, *folders], ROOT, [environment()], 120)
    assert done.returncode == 0 and done.stdout.count("report: done") == 2, done.stderr
    for run in folders:
        assert_same(run, calm)


def test_a_comparison_whose_terminal_is_lost_stops_its_runs(settings, taught, tmp_path):
    settings["train"]["epochs"], settings["teacher"] = 500, {"model": str(taught)}
    argv = ["compare", "--config", write_config(settings, tmp_path), "--methods", "finetune", "--seeds", "1"]
    files = tmp_path / "output", tmp_path / "error"
    program = ROOT / "pkd_dist/cli/__main__.py"
    job = forked.Process(program, [*argv, "--output", tmp_path / "out"], ROOT, environment(), *files)
    try:
        until("metrics.jsonl:3", tmp_path / "out/finetune/seed-1", [job])
        job.send_signal(signal.SIGHUP)
        _, said = job.communicate(60)
    finally:
        job.kill()
    assert job.returncode == 75
    assert said == "pkd: compare: stopped; finished runs are kept, rerun the same command to resume\n"
    log = (tmp_path / "out/finetune/seed-1/logs/rank-0.log").read_text()
    assert "distill: stopped by SIGTERM; a checkpoint of step " in log


CLOSED = "standard output is closed, and the answers are written there; redirect it to a file"


@pytest.mark.parametrize(
    ("arguments", "way", "status", "said"),
    [
        ("config reference", "full", 2, "pkd: standard output cannot be written (No space left on device)\n"),
        ("--help", "full", 2, "pkd: standard output cannot be written (No space left on device)\n"),
        ("prepare --task sst2 --data data/movie-reviews", "nobody reads", 0, ""),
        ("prepare --task sst2 --data data/movie-reviews", "closed", 0, ""),
        ("predict good", "closed", 2, f"pkd: {CLOSED}\n"),
    ],
)
def test_a_command_whose_output_cannot_be_written(arguments, way, status, said):
    argv = [sys.executable, "-m", "pkd_dist.cli", *arguments.split()]
    before = OUTPUTS[way].partition("\nsys.")[0].replace("(1, 2)", "(1,)").replace("range(3)", "range(2)")
    done = subprocess.run(
        argv, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=lambda: exec(before, {"os": os})
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (status, said)


@pytest.mark.parametrize("moment", ["teacher_metrics.jsonl:9", "metrics.jsonl:9"])
def test_a_job_that_is_requeued_on_another_kind_of_host_keeps_what_it_has_made(body, data, tmp_path, moment):
    """Where the settings leave the precision to the host; here the first multiplies in bfloat16, and the second does not."""
    settings = whole_run(body, data, tmp_path)
    settings["checkpoint"]["every_steps"] = 4
    config, run = write_config(settings, tmp_path), tmp_path / "run"
    hosts = {}
    for name, features in (("new", {"avx512_bf16": True}), ("old", {"avx2": True})):
        (folder := tmp_path / name).mkdir()
        hosts[name] = after(f"import torch\ntorch.cpu.get_capabilities = lambda: {features}", folder)
    files = tmp_path / "out", tmp_path / "err"
    job = forked.Process(hosts["new"], ["--config", config], ROOT, environment(), *files)
    try:
        until(moment, run, [job])
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 75
    finally:
        job.kill()
    done = forked.run(hosts["old"], ["--config", config, *TO_EXPORT], ROOT, [environment()], 120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "another kind of host: training in autocast bfloat16, the teacher in bfloat16" in done.stdout + done.stderr
    assert "resuming from step" in done.stdout and not (run / "previous").exists(), done.stdout
    explicit = "train.deepspeed=ds_configs/zero1_fp32.json"
    plan = forked.run(hosts["old"], ["--config", config, explicit, "--dry-run"], ROOT, [environment()], 120)
    assert "teacher: runs, because the training precision changed (autocast bfloat16 -> float32)" in plan.stdout, (
        plan.stdout
    )
