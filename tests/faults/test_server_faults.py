"""What goes wrong with a server that is measured, and with questions: exit code 2, one message, what was measured is
kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specforge.evaluate import launched
from tests import hub_server, tiny
from tests.chat_server import Chat, chatting
from tests.faults.page import fault
from tests.faults.test_bad_input import ROOT, refused, run

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refusal(*arguments: object) -> str:
    return refused(run, Path.cwd(), "benchmark", "--output", "out.json", *arguments)


@fault(
    "nothing answers at the URL",
    "refused",
)
def test_no_server_at_the_url():
    url = f"http://127.0.0.1:{launched._free_port()}"
    assert f"--server {url}" in refusal("--server", url)
    assert "--server nonsense" in refusal("--server", "nonsense")


def test_a_url_that_is_no_openai_server():
    with hub_server.serving(hub_server.Hub()) as other:
        assert "GET /v1/models gives HTTP 404" in refusal("--server", other.url)


@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_server_that_answers_nothing(status):
    with chatting(Chat(status=status)) as chat:
        assert f"HTTP {status}: it is too warm" in refusal("--server", chat.url)


def test_a_server_that_tells_no_number_of_tokens():
    with chatting(Chat(counts_tokens=False)) as chat:
        assert "include_usage" in refusal("--server", chat.url)


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
@fault(
    "a server dies while it is measured",
    "a partial result, and what is missing",
)
def test_a_server_that_dies_in_mid_run_leaves_a_partial_result(kind):
    given = ["--num-prompts", 6, "--concurrency", "1 2 4", "--output", "out.json"]
    with chatting(Chat(kind=kind)) as whole:
        code, output = run("benchmark", "--server", whole.url, *given[:2], "--concurrency", 1, "--output", "whole.json")
        assert code == 0, output
    one_run = len(whole.requests)  # the question that warms up, and those of the first concurrency
    with chatting(Chat(kind=kind, dies_after=one_run + 3)) as chat:
        code, output = run("benchmark", "--server", chat.url, *given)
    assert code == 2
    assert output.count("where:") == output.count("fix:") == 1
    assert "the connection was lost" in output
    assert "marked as partial" in output
    result = json.loads(Path("out.json").read_text())
    assert result["partial"] is True
    first, second = result["served"]["levels"]
    assert (first["concurrency"], second["concurrency"]) == (1, 2)
    assert first["requests"] == json.loads(Path("whole.json").read_text())["served"]["levels"][0]["requests"]
    assert 1 <= second["requests"] <= 3
    assert result["served"]["acceptance_length"] == pytest.approx(2.5)


@pytest.mark.parametrize(("which", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_leaves_a_partial_result(which, code):
    with chatting(Chat(kind="sglang", pause=0.02)) as chat:
        given = ["--server", chat.url, "--num-prompts", "42", "--concurrency", "2", "--output", "out.json"]
        process = subprocess.Popen(
            [sys.executable, "-m", "specforge.cli", "benchmark", *given],
            env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        while len(chat.requests) < 9:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(which)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said
    result = json.loads(Path("out.json").read_text())
    assert result["partial"] is True
    assert result["served"]["levels"][0]["requests"] >= 4


def test_questions_that_are_none():
    with chatting(Chat()) as chat:
        asking = ["--server", chat.url, "--questions"]
        assert "did you mean mt_bench?" in refusal(*asking, "mtbench")
        assert "builtin, mt_bench, humaneval" in refusal(*asking, "something")
        assert "--questions none.jsonl" in refusal(*asking, "none.jsonl")
        tiny.write_jsonl(Path("rows.jsonl"), [{"prompt": "a"}, {"text": "b"}])
        assert "rows.jsonl, line 2" in refusal(*asking, "rows.jsonl")
        Path("broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
        assert "broken.jsonl:2" in refusal(*asking, "broken.jsonl")
        Path("empty.jsonl").write_text("")
        assert "empty.jsonl" in refusal(*asking, "empty.jsonl")
    assert not chat.requests


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--server U --launch --model-path t", "--server, --launch"),
        ("--launch", "--model-path"),
        ("--server U --launch-args --x", "--launch-args"),
        ("--model-path t --draft d --data x --concurrency 2", "--concurrency"),
        ("--server U --draft d", "--draft"),
        ("--server U --tp-size 2", "--tp-size"),
        ("--server U --steps 3 --chat-template llama3", "--chat-template, --steps"),
        ("--launch --model-path t --engine hf", "--engine"),
        ("--launch --model-path t --launch-args 'a", "--launch-args"),
        ("--server U --data x", "--data"),
        ("--server U --num-prompts 0", "--num-prompts"),
        ("--server U --concurrency 0", "--concurrency"),
        ("--server U --concurrency many", "--concurrency"),
        ("--data x", "--draft, --model-path"),
        ("", "--draft, --model-path"),
    ],
)
def test_settings_that_do_not_go_together(given, named):
    assert named in refusal(*given.replace("U", "http://127.0.0.1:9").split())


def test_ranks_do_not_ask_a_server_each(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "each rank would ask" in refusal("--server", "http://127.0.0.1:9")


# A server of our own. Its module is one of ours here, which starts at once; tests/e2e/test_served.py has SGLang's.

STUB = """
import os, sys, time, threading
sys.path.insert(0, {root!r})
from tests.chat_server import Chat, Handler, ThreadingHTTPServer
print("loading " + "weights", flush=True)
if "--fails" in sys.argv:
    raise ValueError("no room for the weights")
port = int(sys.argv[sys.argv.index("--port") + 1])
Bound = type("Bound", (Handler,), {{"chat": Chat(kind="sglang", dies_after=5 if "--dies" in sys.argv else None)}})
if os.fork() == 0:  # as SGLang's schedulers: a process beside it, in its group
    time.sleep(600)
open("pid", "w").write(str(os.getpid()))
ThreadingHTTPServer(("127.0.0.1", port), Bound).serve_forever()
"""


def launch(*arguments: object) -> list[str]:
    """The command, with a stub in the place of SGLang's module."""
    Path("stub_server.py").write_text(STUB.format(root=str(ROOT)))
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "  # else ignored in a background
        f"sys.path.insert(0, {str(ROOT)!r}); from specforge import cli; "
        "from specforge.evaluate import launched; launched.MODULE = 'stub_server'; cli.main()"
    )
    own = ["benchmark", "--launch", "--model-path", "t", "--draft", "d", "--output", "out.json"]
    return [sys.executable, "-c", code, *own, "--num-prompts", "2", "--concurrency", "1", *map(str, arguments)]


def gone(group: int) -> bool:
    """Whether the process group is, within the moment that the system takes to bury it."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def done(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(launch(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)


def test_our_own_server_is_shown_measured_and_ended():
    found = done("--launch-args", "--one 'a b'", "--steps", 4, "--tp-size", 2)
    assert found.returncode == 0, found.stdout + found.stderr
    [shown] = [line for line in found.stdout.splitlines() if line.startswith("$ ")]
    assert shown.startswith(
        "$ python -m stub_server --model-path t --speculative-algorithm EAGLE3 --speculative-draft-model-path d "
        "--speculative-num-steps 4 --speculative-eagle-topk 1 --speculative-num-draft-tokens 5 --tp-size 2 --one 'a b' "
        "--host 127.0.0.1 --port "
    )
    result = json.loads(Path("out.json").read_text())
    assert result["served"]["acceptance_length"] == pytest.approx(2.5)
    assert result["served"]["command"].startswith("python -m stub_server --model-path t")
    assert gone(int(Path("pid").read_text()))


@fault(
    "the server that `benchmark --launch` starts dies",
    "refused, with the end of its log",
)
def test_our_own_server_that_dies_while_it_starts():
    found = done("--launch-args", "--fails")
    assert found.returncode == 2
    assert found.stdout.count("where:") == 1
    assert "where: server.log" in found.stdout
    assert "ValueError: no room for the weights" in found.stdout
    assert not Path("out.json").exists()


def test_our_own_server_that_dies_in_mid_run_is_ended_whole():
    found = done("--launch-args", "--dies", "--num-prompts", 20)
    assert found.returncode == 2
    assert found.stdout.count("where:") == 1
    assert json.loads(Path("out.json").read_text())["partial"] is True
    assert gone(int(Path("pid").read_text()))


@pytest.mark.parametrize(("which", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_our_own_server_does_not_outlive_a_run_that_is_stopped(which, code):
    process = subprocess.Popen(
        launch("--concurrency", 1, "--num-prompts", 42, "--max-new-tokens", 8),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not Path("pid").exists() or not Path("pid").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(which)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert gone(int(Path("pid").read_text()))
