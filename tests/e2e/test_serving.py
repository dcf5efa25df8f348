"""`pkd serve` end to end: a real server, valid and invalid requests, many clients, a signal."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment, pkd
from exports import export, subject, with_outlier
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from benchmarks.faults.tiny import sentences
from benchmarks.serving.load import BAD, Client, load, server
from pkd_dist.cli.main import app
from pkd_dist.errors import UserError
from pkd_dist.serve.model import ServedModel
from pkd_dist.serve.server import bound

TEXTS = [text for text, _ in sentences(40, 3)] + ["good " * 200]
BATCH = [text for text, _ in sentences(63, 4)] + TEXTS[-1:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("exported")
    export(with_outlier(subject(made)), made / "export", "onnx", "onnx-int8", "onnx-fp16")
    return made / "export"


@pytest.fixture(scope="module")
def port(folder):
    with server(folder, "--format", "onnx", "--max-queue", "1024") as (_, number):
        yield number


@pytest.fixture(scope="module")
def check(folder):
    """Compare an answer with that of plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    given = AutoTokenizer.from_pretrained(folder)(
        TEXTS, truncation=True, max_length=32, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        wanted = dict(zip(TEXTS, model(**given).logits.softmax(-1).tolist(), strict=True))

    def compare(text, answer):
        negative, positive = wanted[text]
        assert answer["probabilities"] == pytest.approx({"negative": negative, "positive": positive}, abs=1e-4)
        assert answer["label"] == ("negative", "positive")[positive > negative]
        assert answer.get("truncated", False) == (text == TEXTS[-1]), "of 200 words, for a model that reads 32 tokens"

    return compare


def once(port, content, kind="application/json"):
    return asyncio.run(Client(port).post(content, kind))


def test_one_text_and_several(port, check):
    status, answer = once(port, {"text": TEXTS[0]})
    assert status == 200 and answer.keys() == {"label", "probability", "probabilities"}
    check(TEXTS[0], answer)
    given = [TEXTS[1], TEXTS[2], TEXTS[-1]]
    status, answer = once(port, {"texts": [given[0], {"text": given[1]}, given[2]]})
    assert status == 200
    for text, found in zip(given, answer["answers"], strict=True):
        check(text, found)
    assert once(port, {"text": TEXTS[-1]})[1]["truncated"] is True


@pytest.mark.parametrize("name", BAD)
def test_invalid_requests_are_rejected(name, port):
    content, kind, status = BAD[name]
    found, body = once(port, content, kind)
    assert found == status and isinstance(body["error"], str), body


def require_independent(alone, together):
    """The same texts, each alone and all in one batch."""
    assert len(alone) == len(together) == 64
    assert [answer["label"] for answer in together] == [answer["label"] for answer in alone]
    for one, other in zip(alone, together, strict=True):
        assert other["probabilities"] == pytest.approx(one["probabilities"], abs=1e-3)
    assert len({answer["label"] for answer in alone}) == 2 and any(answer.get("truncated") for answer in alone)


def test_a_text_alone_and_among_63_others_through_the_default_file(folder):
    with server(folder, "--max-batch", "64") as (_, port):

        async def ask():
            client = Client(port)
            alone = [(await client.post({"text": text}))[1] for text in BATCH]
            together = (await client.post({"texts": BATCH}))[1]["answers"]
            return (await client.get("/healthz"))[1]["file"], (await client.get("/metrics"))[1], alone, together

        file, page, alone, together = asyncio.run(ask())
    assert file == "onnx/model.int8.onnx"
    assert b'pkd_serve_batch_texts_bucket{le="1.0"} 64' in page and b"pkd_serve_batch_texts_sum 128" in page
    assert b'pkd_serve_batch_texts_bucket{le="32.0"} 64' in page and b"pkd_serve_batch_texts_count 65" in page
    require_independent(alone, together)


@pytest.mark.parametrize("format", ["onnx", "onnx-int8", "onnx-fp16"])
def test_a_text_alone_and_among_63_others_through_each_onnx_file(format, folder):
    model = ServedModel(folder, format, 1)
    texts = [(text,) for text in BATCH]
    require_independent([model.answer([text])[0] for text in texts], model.answer(texts))


def test_a_text_alone_and_among_63_others_through_the_weights(folder, tmp_path):
    (tmp_path / "texts").write_text("\n".join(BATCH))

    def predicted(size):
        argv = ["predict", "--model", str(folder), "--file", str(tmp_path / "texts"), "--batch-size", str(size)]
        return [json.loads(line) for line in CliRunner().invoke(app, argv).stdout.splitlines()]

    require_independent(predicted(1), predicted(64))


def test_other_paths_and_methods(port):
    async def ask():
        client = Client(port)
        return [await client.get(path) for path in ("/healthz", "/predict", "/nothing", "/metrics")]

    (healthy, about), (method, _), (path, _), (_, page) = asyncio.run(ask())
    assert healthy == 200 and about["status"] == "ok" and about["file"] == "onnx/model.onnx"
    assert (method, path) == (405, 404)
    assert b'pkd_serve_requests_total{status="200"}' in page and b"pkd_serve_batch_texts_bucket" in page


def test_64_clients_at_once(port, check):
    found = asyncio.run(load(port, TEXTS, check, clients=64, requests=12))
    assert found["answered"] > 300 and found["refused"] > 100 and "busy" not in found, found
    status, _ = asyncio.run(Client(port).get("/healthz"))
    assert status == 200


def test_requests_over_a_limit_are_rejected_until_there_is_room(folder):
    options = ("--max-queue", "8", "--max-delay-ms", "1000", "--max-concurrency", "6")
    with server(folder, *options) as (_, port):

        async def ask(count, texts):
            found = await asyncio.gather(*(Client(port).post({"texts": texts}) for _ in range(count)))
            return {status for status, _ in found}

        assert asyncio.run(ask(12, TEXTS[:1])) == {200, 503}
        assert asyncio.run(ask(5, TEXTS[:3])) == {200, 429}
        assert once(port, {"text": "a good film"})[0] == 200


def test_requests_in_progress_are_answered_after_a_signal(folder):
    with server(folder, "--max-delay-ms", "1000") as (process, port):

        async def ask():
            clients = [Client(port) for _ in range(8)]
            asked = [
                asyncio.create_task(client.post({"text": text})) for client, text in zip(clients, TEXTS, strict=False)
            ]
            watch = Client(port)
            while b"pkd_serve_waiting_texts 7.0" not in (await watch.get("/metrics"))[1]:
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            return [status for status, _ in await asyncio.gather(*asked)]

        assert asyncio.run(ask()) == [200] * 8
        assert process.wait(30) == 0


def test_a_second_ctrl_c_cuts_requests_off_and_says_so(folder):
    with server(folder, "--max-delay-ms", "10000") as (process, port):

        async def ask():
            asked = [asyncio.create_task(Client(port).post({"text": text})) for text in TEXTS[:3]]
            watch = Client(port)
            while b"pkd_serve_waiting_texts 2.0" not in (await watch.get("/metrics"))[1]:
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(ConnectionRefusedError):
                while True:  # until it has noted the first: two at once would be one
                    (await asyncio.open_connection("127.0.0.1", port))[1].close()
                    await asyncio.sleep(0.01)
            process.send_signal(signal.SIGINT)
            return await asyncio.gather(*asked, return_exceptions=True)

        assert not any(isinstance(answer, tuple) and answer[0] not in (0, 503) for answer in asyncio.run(ask()))
        assert process.wait(30) == 0
        assert "serve: stopped; 3 request(s) were cut off" in process.stdout.read()
        assert "Traceback" not in process.stderr.read()


def test_a_port_in_use(folder, port):
    done = pkd("serve", folder, "--port", port)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"--port: cannot listen on 127.0.0.1:{port} (Address already in use)" in done.stderr


@pytest.mark.parametrize(
    ("host", "message"),
    [("", "--host: is empty; give 127.0.0.1"), ("nowhere.invalid", "--host: nowhere.invalid cannot be resolved")],
)
def test_an_invalid_host(host, message):
    with pytest.raises(UserError, match=message):
        bound(host, 0)


def test_without_the_extra(folder):
    code = "import sys; sys.modules['uvicorn'] = None; from pkd_dist.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", str(folder)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr == "pkd: the Python package uvicorn is not installed: pip install 'pkd_dist[serve]'\n"


def test_an_export_without_onnx(tmp_path):
    export(subject(tmp_path), tmp_path / "export")
    done = pkd("serve", tmp_path / "export")
    assert done.returncode == 2 and "has no file of the format onnx" in done.stderr and done.stderr.count("\n") == 1


def test_idle_connections_do_not_stop_the_server(folder):
    """More clients that send nothing, or half a request, than the server has file descriptors."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); "
        "from pkd_dist.cli.main import main; main()"
    )
    with server(folder, prefix=("-c", code)) as (process, port), contextlib.ExitStack() as sockets:
        for i in range(300):
            idle = sockets.enter_context(socket.create_connection(("127.0.0.1", port), 10))
            if i % 2:
                idle.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\n")
            if i % 100 == 99:
                assert once(port, {"text": TEXTS[0]})[0] == 200
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and said == "", "no line for each connection"
