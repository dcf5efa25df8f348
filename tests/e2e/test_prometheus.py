"""Real runs with Prometheus and a Pushgateway: their series equal what the run has written."""

import contextlib
import functools
import itertools
import json
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request

import pytest
from certificates import make_certificate
from conftest import ROOT, environment, launch, results, started, whole_run, write_config
from prometheus_client.parser import text_string_to_metric_families

from pkd_dist.config.load import load
from pkd_dist.network import free_port
from pkd_dist.telemetry.discovery import Target, target_name
from pkd_dist.telemetry.endpoint import Access, load_access, serve
from pkd_dist.telemetry.metrics import RunMetrics
from pkd_dist.telemetry.records import read

pytestmark = pytest.mark.usefixtures("prometheus_programs")


def until(happens, what, timeout_seconds=120):
    deadline = time.monotonic() + timeout_seconds
    while not (found := happens()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_seconds} s"
        time.sleep(0.1)
    return found


def fetch(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def answers(url):
    try:
        return fetch(url) is not None
    except OSError:
        return False


@contextlib.contextmanager
def program(*argv, log):
    with open(log, "wb") as out:
        process = subprocess.Popen(list(map(str, argv)), stdout=out, stderr=out, cwd=log.parent)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


class Prometheus:
    """Prometheus with the configuration of the project, scraping twice a second; has folders `targets` and `gateways`."""

    def __init__(self, folder, **replaced):
        self.folder, self.url = folder, f"http://127.0.0.1:{free_port()}"
        self.targets, self.gateways = folder / "targets", folder / "gateways"
        text = (ROOT / "monitoring/prometheus.yml").read_text()
        for often, here in (
            ("scrape_interval: 10s", "scrape_interval: 500ms"),
            ("evaluation_interval: 30s", "evaluation_interval: 1s"),
        ):
            assert often in text
            text = text.replace(often, here)
        for old, new in replaced.items():
            assert f"# {old}: " in text
            text = re.sub(rf"# {old}: .*", f"{old}: {new}", text)
        for made in (self.targets, self.gateways):
            made.mkdir(parents=True)
        (folder / "prometheus.yml").write_text(text)
        shutil.copytree(ROOT / "monitoring/rules", folder / "rules")
        alerts = folder / "rules/alerts.yml"
        text = alerts.read_text()
        assert text.count("for: 1m\n") == 1, "that of PkdRunCrashed"
        alerts.write_text(text.replace("for: 1m\n", "for: 10s\n"))  # Prometheus drops a target up to 5 s after its file

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        options = [f"--config.file={self.folder}/prometheus.yml", f"--storage.tsdb.path={self.folder}/data"]
        options += [f"--web.listen-address={self.url.removeprefix('http://')}", "--log.level=warn"]
        self._stack.enter_context(program("prometheus", *options, log=self.folder / "prometheus.log"))
        until(lambda: answers(f"{self.url}/-/ready"), "Prometheus")
        return self

    def __exit__(self, *_):
        self._stack.close()

    def active(self):
        found = json.loads(fetch(f"{self.url}/api/v1/targets?state=active"))["data"]["activeTargets"]
        return [target for target in found if target["labels"]["job"] == "pkd"]

    def query(self, expression):
        """Return the resulting series: (labels, values or value)."""
        answer = json.loads(fetch(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"))
        return [(series["metric"], series.get("values", series.get("value"))) for series in answer["data"]["result"]]

    def samples(self, selector):
        """Map the time of each scrape to the value, for one series."""
        [(_, values)] = self.query(f"{selector}[1h]")
        return {at: float(value) for at, value in values}

    def value(self, expression):
        """Return the current value of one series; None if there is none."""
        found = self.query(expression)
        return float(found[0][1][1]) if found else None


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    with Prometheus(tmp_path_factory.mktemp("prometheus")) as prometheus:
        yield prometheus


@pytest.fixture(scope="module")
def gateway(prometheus):
    """Start a Pushgateway that Prometheus scrapes, and return its URL."""
    address = f"127.0.0.1:{free_port()}"
    with program(
        "prometheus-pushgateway",
        f"--web.listen-address={address}",
        "--persistence.file=",
        log=prometheus.folder / "pushgateway.log",
    ):
        until(lambda: answers(f"http://{address}/metrics"), "the Pushgateway")
        (prometheus.gateways / "here.json").write_text(json.dumps([{"targets": [address]}]))
        yield f"http://{address}"


def watched(body, data, folder, prometheus, gateway):
    settings = whole_run(body, data, folder)
    settings["train"]["epochs"] = 60
    settings["checkpoint"]["every_steps"] = 100
    settings["metrics"] = {"port": 0, "discovery_dir": str(prometheus.targets), "pushgateway": gateway}
    return settings


def port(prometheus):
    """Return the port of the only target."""
    return urllib.parse.urlsplit(prometheus.active()[0]["scrapeUrl"]).port


def discover(process, prometheus):
    """Pause a run until Prometheus has its target: that takes up to 5 s, in which a short run could end unseen."""
    until(lambda: list(prometheus.targets.glob("pkd-*.json")), "the target's file")
    process.send_signal(signal.SIGSTOP)
    until(prometheus.active, "the target")
    process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def run(prometheus, gateway, body, data, tmp_path_factory):
    """Run on two ranks; return the run folder, target files, targets, a scrape during training, and the output."""
    folder = tmp_path_factory.mktemp("watched")
    config = write_config(watched(body, data, folder, prometheus, gateway), folder)
    with started("--config", config, ranks=2) as job:
        distilling = 'pkd_step > 5 and on (instance) pkd_stage{stage="distill"} == 1'
        until(lambda: prometheus.query(distilling), "a scraped step of the student")
        files, targets = list(prometheus.targets.iterdir()), prometheus.active()
        served = fetch(targets[0]["scrapeUrl"])
        out, _ = job[0].communicate(timeout=240)
        assert (job[0].returncode, job[1].wait(60)) == (0, 0), out
    return folder / "run", files, targets, served, out


def test_prometheus_finds_a_live_run(run, prometheus):
    folder, files, targets, _, out = run
    assert len(files) == len(targets) == 1, "one endpoint for the two ranks of a node"
    labels = {"instance": f"{folder}/0", "job": "pkd", "node": "0", "run": str(folder)}
    assert (targets[0]["health"], targets[0]["labels"]) == ("up", labels)
    assert f"metrics: {targets[0]['scrapeUrl'].partition('?')[0]}\n" in out
    assert not list(prometheus.targets.iterdir()), "the file is removed at the end of the run"
    until(lambda: not prometheus.active(), "Prometheus forgets the target")
    assert not prometheus.query(f'ALERTS{{alertname="PkdRunCrashed", alertstate="firing", run="{folder}"}}[1h]')


def test_served_metrics_pass_promtool(run):
    checked = subprocess.run(["promtool", "check", "metrics"], input=run[3], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    assert all(f"# TYPE {metric.name} " in run[3] for metric in RunMetrics().documented)


def test_scraped_values_are_those_the_run_wrote(run, prometheus):
    folder = run[0]
    records = list(read(folder / "metrics.jsonl"))
    lines = {record["step"]: record for record in records if "split" not in record}
    live = f'job="pkd", run="{folder}"'
    live += ', stage="distill"'
    shown = prometheus.samples(f'pkd_loss{{{live}, term="pt"}}')
    steps = {at: int(step) for at, step in prometheus.samples(f"pkd_step{{{live}}}").items() if at in shown}
    assert len(set(steps.values())) >= 3
    for term, key in (("total", "loss"), ("ce", "loss_ce"), ("ds", "loss_ds"), ("pt", "loss_pt")):
        found = prometheus.samples(f'pkd_loss{{{live}, term="{term}"}}')
        for at, step in steps.items():  # training continues while a scrape reads the metrics one by one
            near = [lines[number][key] for number in (step - 1, step, step + 1) if number in lines]
            assert found[at] in near, (term, step)
    written = {record["main_metric"] for record in records if "split" in record}
    found = prometheus.samples(f'pkd_eval_metric{{{live}, split="dev", metric="main_metric"}}')
    assert found and set(found.values()) <= written
    ends = set(prometheus.samples(f"pkd_expected_end_timestamp_seconds{{{live}}}").values())
    ended = max(record["time"] for record in records)
    assert ends and all(abs(end - ended) < 60 for end in ends), (ends, ended)
    teacher = prometheus.query(f'last_over_time(pkd_loss{{run="{folder}", job="pkd", stage="teacher"}}[1h])')
    assert {labels["term"] for labels, _ in teacher} <= {"total", "ce"}, (
        "the teacher may be done before the first scrape"
    )
    assert set(prometheus.samples(f"pkd_loss_scale{{{live}}}").values()) <= {0, 1}


def test_the_last_values_are_pushed(run, prometheus, gateway):
    folder = run[0]
    last = f'job="pkd_last", run="{folder}", node="0", instance="{folder}/0"'
    steps = max(record["step"] for record in read(folder / "metrics.jsonl"))
    until(lambda: prometheus.value(f"pkd_step{{{last}}}") == steps, "the last step")
    assert prometheus.value(f"pkd_steps_total_expected{{{last}}}") == steps
    assert prometheus.value(f"pkd_expected_end_timestamp_seconds{{{last}}}") is None
    [(labels, (_, status))] = prometheus.query(f"pkd_run_end_status{{{last}}}")
    assert (labels["stage"], labels["host"], status) == ("report", socket.gethostname(), "0")
    assert prometheus.value(f"sum(pkd_stage{{{last}}})") == 0
    assert prometheus.value(f"count(pkd_stage{{{last}}})") == 8
    for name in ("accuracy", "MCC", "f_1", "main_metric"):
        expression = f'pkd_eval_metric{{{last}, split="dev", metric="{name}"}}'
        assert prometheus.value(expression) == results(folder)[name]
    assert prometheus.value(f"pkd_cache_rows_total{{{last}}}") == prometheus.value(f"pkd_cache_rows_expected{{{last}}}")
    assert prometheus.value(f"pkd_cache_rows_total{{{last}}}") in (100, 103), "rank 0's shards of 203 rows, 50 each"
    assert prometheus.value(f"pkd_samples_total{{{last}}}") == 203 * (2 + 60)
    assert prometheus.value(f"pkd_step_seconds_count{{{last}}}") == 13 * (2 + 60)


def test_rerun_pushes_the_final_values(run, gateway):
    folder = run[0]

    def pushed():
        metrics = text_string_to_metric_families(fetch(f"{gateway}/metrics"))
        samples = [sample for family in metrics for sample in family.samples if sample.labels.get("run") == str(folder)]
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for sample in samples
            if sample.name.startswith("pkd_") and not sample.name.startswith(("pkd_checkpoint_", "pkd_info"))
        }

    before = pushed()
    assert before
    again = launch("--config", folder / "config.yaml", timeout=240)
    assert again.returncode == 0 and "distill: done" in again.stdout and "distill: runs" not in again.stdout, (
        again.stderr
    )
    assert pushed() == before


def test_counters_survive_kill_9_and_a_stop(prometheus, gateway, body, data, tmp_path):
    """The run is too long to end by itself while this test waits for Prometheus: each of its processes is stopped."""
    settings = watched(body, data, tmp_path, prometheus, "http://127.0.0.1:1")
    settings["train"]["epochs"] = 10_000
    config = write_config(settings, tmp_path)
    live = f'job="pkd", run="{tmp_path / "run"}"'

    start = functools.partial(started, "--config", config, "--stages", "data,teacher,cache,init,distill")
    until(lambda: not prometheus.active(), "no target of another test")

    crashed = f'ALERTS{{alertname="PkdRunCrashed", alertstate="firing", {live}}}'

    def distilled(step):
        return f'pkd_step{{{live}}} > {step} and on (instance) pkd_stage{{stage="distill"}} == 1'

    for stop, step, status in ((signal.SIGKILL, 40, -9), (signal.SIGTERM, 120, 75)):
        with start() as [process]:
            discover(process, prometheus)
            until(lambda step=step: prometheus.query(distilled(step)), f"step {step}")
            until(lambda: not prometheus.query(crashed), "no alert on a live run")
            process.send_signal(stop)
            assert process.wait(60) == status
        if stop == signal.SIGKILL:
            assert list(prometheus.targets.iterdir()), "Prometheus looks for the run"
            until(lambda: prometheus.query(crashed), "the alert")
            endpoint = serve(RunMetrics().registry, "127.0.0.1", port(prometheus), Access(), "another run")
            until(
                lambda: "404" in prometheus.active()[0]["lastError"], "another run on the same port rejects the scrape"
            )
            assert prometheus.query(crashed)
            endpoint.close()
        else:
            assert not list(prometheus.targets.iterdir()), "an orderly end removes the file"
            until(lambda: not prometheus.active(), "no target")
    with start() as [process]:
        discover(process, prometheus)
        until(lambda: prometheus.query(distilled(200)), "step 200")
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 75, out
    for counter in ("pkd_samples_total", "pkd_tokens_total", "pkd_step_seconds_count", "pkd_data_wait_seconds_total"):
        assert prometheus.value(f"resets({counter}{{{live}}}[1h])") == 0, counter
    assert prometheus.value(f"changes(process_start_time_seconds{{{live}}}[1h])") == 2, "three processes"
    assert prometheus.value(f"max_over_time(pkd_preemptions_total{{{live}}}[1h])") >= 1, "of the process before"
    counters = json.loads((tmp_path / "run/counters/node-0.json").read_text())
    assert counters["pkd_preemptions_total"] == 2
    epochs, steps = divmod(max(row["step"] for row in read(tmp_path / "run/metrics.jsonl") if "loss_ds" in row), 13)
    counted = counters["pkd_samples_total"]
    assert counted >= 203 * (2 + epochs) + 16 * steps, "nothing is lost; repeated steps may count again"
    assert prometheus.value(f"last_over_time(pkd_samples_total{{{live}}}[1h])") <= counted
    times = prometheus.samples(f"pkd_checkpoint_last_success_timestamp_seconds{{{live}}}")
    known = [time for time in times.values() if time]
    assert known and all(b > a - 1 for a, b in itertools.pairwise(known)), "of the checkpoint that it resumes from"
    assert out.count("metrics: cannot push to http://127.0.0.1:1 (") == 1 and "the run continues" in out


def test_nonfinite_loss_ends_the_run_and_fires_the_alert(prometheus, gateway, body, data, tmp_path):
    """The count cannot be scraped any more: it is pushed, and the next process continues from it."""
    settings = watched(body, data, tmp_path, prometheus, gateway)
    settings["teacher"]["finetune"]["learning_rate"] = 1e30
    done = launch("--config", write_config(settings, tmp_path), "--stages", "data,teacher")
    assert done.returncode == 3, done.stdout + done.stderr
    last = f'job="pkd_last", run="{tmp_path / "run"}"'
    until(lambda: prometheus.value(f"pkd_nonfinite_total{{{last}}}") == 1, "the count")
    firing = f'ALERTS{{alertname="PkdLossNotFinite", alertstate="firing", {last}}}'
    until(lambda: prometheus.query(firing), "the alert")
    failed = f'ALERTS{{alertname="PkdRunFailed", alertstate="firing", {last}, stage="teacher"}}'
    until(lambda: prometheus.query(failed), "the alert on the failure")
    assert prometheus.value(f"pkd_run_end_status{{{last}}}") == 3
    assert not list(prometheus.targets.iterdir()), "the gateway has the status"
    assert RunMetrics(tmp_path / "run/counters/node-0.json").value("pkd_nonfinite_total") == 1


def test_scrape_with_tls_and_password(tmp_path):
    certificate, key = make_certificate(tmp_path)
    for name, content in (("users", "scraper:secret\n"), ("scraper.password", "secret")):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o600)
    settings = {"tls_cert": certificate, "tls_key": key, "password_file": tmp_path / "users"}
    config = load(None, ["run.dir=x", *(f"metrics.{name}={value}" for name, value in settings.items())]).metrics
    metrics = RunMetrics()
    metrics.samples.inc(7)
    name = target_name(tmp_path / "run", 0)
    endpoint = serve(metrics.registry, "127.0.0.1", 0, load_access(config), name)
    given = {
        "basic_auth": f"{{username: scraper, password_file: {tmp_path}/scraper.password}}",
        "tls_config": f"{{ca_file: {certificate}}}",
    }
    with Prometheus(tmp_path / "prometheus", **given) as prometheus:
        target = Target(prometheus.targets, tmp_path / "run", 0, "127.0.0.1", endpoint.port, https=True)
        until(lambda: prometheus.value("pkd_samples_total") == 7, f"a scrape ({prometheus.active})")
        assert prometheus.active()[0]["scrapeUrl"] == f"https://127.0.0.1:{endpoint.port}/metrics?target={name}"
        target.close()
    endpoint.close()


def test_try_sh_prints_the_targets(tmp_path):
    metrics = RunMetrics()
    name = target_name(tmp_path / "run", 0)
    endpoint = serve(metrics.registry, "127.0.0.1", 0, Access(), name)
    target = Target(tmp_path / "targets", tmp_path / "run", 0, "127.0.0.1", endpoint.port, https=False)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    address = f"127.0.0.1:{endpoint.port}"
    for given, query, instance in ((address, "", address), (tmp_path / "targets", f"?target={name}", f"{tmp_path}/run/0")):  # fmt: skip
        extra = environment(PORT=str(free_port()), TMPDIR=str(scratch))
        argv = [ROOT / "monitoring/try.sh", str(given)]
        shown = subprocess.Popen(argv, env=extra, stdout=subprocess.PIPE, text=True)
        lines = []
        for line in shown.stdout:
            lines.append(line)
            if line.startswith("Ctrl-C"):
                break
        assert f"up      http://127.0.0.1:{endpoint.port}/metrics{query}  {instance}  \n" in lines, lines
        url = next(re.search(r"http://127.0.0.1:\d+", line)[0] for line in lines if line.startswith("Prometheus: "))
        assert answers(f"{url}/-/ready")
        shown.send_signal(signal.SIGTERM)
        shown.wait(30)
        assert not answers(f"{url}/-/ready") and not list(scratch.iterdir()), "nothing is left"
    target.close()
    endpoint.close()
    refused = subprocess.run([ROOT / "monitoring/try.sh", "nothing"], capture_output=True, text=True, env=environment())
    assert (refused.returncode, refused.stderr) == (2, "try.sh: nothing: neither a folder nor HOST:PORT\n")


@pytest.mark.parametrize("key", ["tls", "password"])
def test_unusable_files_end_the_run_before_it_starts(settings, tmp_path, key):
    given = {"tls": {"tls_cert": "a.pem", "tls_key": "b.pem"}, "password": {"password_file": "c"}}[key]
    settings["metrics"] = {"port": 0, **given}
    done = launch("--config", write_config(settings, tmp_path))
    name, value = next(iter(given.items()))
    said = f"pkd: metrics.{name}: {value} cannot be read (No such file or directory)\n"
    assert (done.returncode, done.stderr) == (2, said)
    assert not (tmp_path / "run").exists()
