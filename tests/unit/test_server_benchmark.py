"""benchmark --server: figures, and the command against an HTTP server of our own that tells its accepted length in
SGLang's and vLLM's words (tests/chat_server.py). Real SGLang servers: tests/e2e/test_served.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specforge import cli
from specforge.config import BenchmarkSettings
from specforge.errors import EngineError
from specforge.evaluate import kinds, launched, server
from specforge.evaluate.server import Accepted, Reply, Server
from specforge.evaluate.shape import Shape
from specforge.pipeline import serving
from specforge.records import Conversation, Message, Sampling
from tests.chat_server import Chat, chatting

ROOT = Path(__file__).parents[2]


# Figures


def test_percentiles_lie_between_neighbours():
    assert server.percentiles([]) is None
    assert server.percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0}
    found = server.percentiles([float(n) for n in reversed(range(101))])
    assert found == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert server.percentiles([0.0, 1.0])["p90"] == pytest.approx(0.9)


def test_the_figures_of_a_run_by_hand():
    replies = [
        Reply(domain="a", tokens=11, first=0.5, seconds=1.5, accepted=Accepted(drafts=5, passes=5)),
        Reply(domain="b", tokens=1, first=0.7, seconds=0.7, accepted=Accepted(drafts=3, passes=1)),
        Reply(domain="b", failure="HTTP 500"),
    ]
    found = server.summary(replies, seconds=2.0)
    assert found["requests"] == 2
    assert found["failed"] == 1
    assert found["tokens"] == 12
    assert found["tokens_per_second"] == 6.0
    assert found["first_token"]["p50"] == pytest.approx(0.6)
    assert found["per_token"]["p50"] == pytest.approx(0.1)  # of the one with several tokens
    assert found["acceptance_length"] == 1 + 8 / 6  # over all passes, not the mean over requests
    by_domain = server.by_domain(replies)
    assert by_domain["a"] == {"acceptance_length": 2.0, "requests": 1}
    assert by_domain["b"] == {"acceptance_length": 4.0, "requests": 1}


def test_a_run_without_an_answer_has_figures():
    found = server.summary([Reply(domain="", failure="x")], seconds=0.0)
    assert found["tokens_per_second"] == 0.0
    assert found["first_token"] is None
    assert found["acceptance_length"] is None


def test_counters_are_summed_over_engines_and_a_server_without_a_draft_has_none():
    text = Chat(kind="vllm").metrics()
    assert server.read_counters(text) == Accepted(drafts=9 * 1500, passes=6 * 1500)
    assert server.read_counters(Chat(kind="vllm", speculative=False).metrics()) is None
    assert server.read_counters("vllm:spec_decode_num_drafts_total 0.0\n").length is None


def test_kinds_that_disagree_by_more_than_five_percent_are_named(capsys):
    assert kinds.disagreements({"a": 2.0, "b": 2.0999}) == []
    [(one, two, share)] = kinds.disagreements({"a": 2.0, "b": 2.09, "c": 2.15})
    assert (one, two) == ("a", "c")
    assert share == pytest.approx(0.075)
    result = {"teacher_forced": {"walk_length": 1.6}, "decode": {"acceptance_length": 1.62}, "steps": 3}
    assert kinds.side_by_side(result)["disagreements"] == []
    assert "warning" not in capsys.readouterr().out
    found = kinds.side_by_side(result | {"served": {"acceptance_length": 1.3, "questions": "builtin"}})
    assert [pair[:2] for pair in found["disagreements"]] == [
        ["teacher-forced walk", "through the server"],
        ["decoding in process", "through the server"],
    ]
    assert found["kinds"]["through the server"] == 1.3
    assert capsys.readouterr().out.count("warning") == 2


DRAFTED = {"steps": 3, "top_k": 1, "draft_tokens": 4}


@pytest.mark.parametrize(
    ("decode", "served", "differ"),
    [
        (DRAFTED, {"steps": 3, "topk": 1, "draft_tokens": 4}, 2),
        (DRAFTED, None, 2),  # vLLM does not tell
        (DRAFTED, {"steps": 3, "topk": 1, "draft_tokens": None}, 2),
        (DRAFTED, {"steps": 3, "topk": 4, "draft_tokens": None}, 0),
        (DRAFTED, {"steps": 3, "topk": 1, "draft_tokens": 2}, 0),
        (DRAFTED | {"draft_tokens": 2}, {"steps": 3, "topk": 1, "draft_tokens": 4}, 1),
    ],
)
def test_kinds_are_compared_where_they_draft_alike(decode, served, differ):
    result = {
        "steps": 3,
        "teacher_forced": {"walk_length": 1.6},
        "decode": {"acceptance_length": 1.6} | decode,
        "served": {"acceptance_length": 1.3, "questions": "builtin", "speculative": served},
    }
    assert len(kinds.side_by_side(result)["disagreements"]) == differ


def test_the_command_line_of_a_server_can_be_copied():
    given = launched.arguments("org/target", "my runs/best", Shape.chain(3))
    assert launched.command_line(given) == (
        "python -m sglang.launch_server --model-path org/target --speculative-algorithm EAGLE3 "
        "--speculative-draft-model-path 'my runs/best' --speculative-num-steps 3 --speculative-eagle-topk 1 "
        "--speculative-num-draft-tokens 4"
    )
    assert launched.arguments("org/target", None, Shape.chain(3)) == ["--model-path", "org/target"]


# The client


def asked(chat: Chat, *questions: Conversation, at_once: int = 1, temperature: float = 0.0) -> list[Reply]:
    found = server.recognise(chat.url, "m")
    replies = list[Reply]()
    sampling = Sampling(max_new_tokens=16, temperature=temperature)
    asyncio.run(server.ask(found, questions, at_once, sampling, 7, replies.append))
    return replies


def question(*turns: str, domain: str = "") -> Conversation:
    return Conversation(id="q", domain=domain, messages=tuple(Message(role="user", content=text) for text in turns))


def test_every_turn_is_asked_with_the_answers_before_it():
    with chatting(Chat(kind="sglang")) as chat:
        replies = asked(chat, question("one", "two", domain="d"))
    history = [[(m["role"], m["content"]) for m in request["messages"]] for request in chat.requests]
    answer = ("assistant", "word0 word1 word2 word3 ")
    assert history == [[("user", "one")], [("user", "one"), answer, ("user", "two")]]
    assert [reply.domain for reply in replies] == ["d", "d"]
    assert replies[0].tokens == 16
    assert replies[0].accepted == Accepted(drafts=9, passes=6)
    assert "seed" not in chat.requests[0]


def test_times_are_those_of_the_stream():
    with chatting(Chat(pause=0.05)) as chat:
        [reply] = asked(chat, question("one"))
    assert 0.05 <= reply.first < reply.seconds
    assert reply.seconds >= 0.2  # four chunks
    assert reply.per_token == (reply.seconds - reply.first) / 15
    assert reply.accepted is None


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "tool_calls"])
def test_the_first_token_may_be_a_thought(key):
    first = {"choices": [{"delta": {key: "hm"}}]}
    with chatting(Chat(pause=0.05, chunks=[first, TEXT, TEXT, USAGE])) as chat:
        [reply] = asked(chat, question("one"))
    assert reply.seconds - reply.first >= 2 * 0.05  # the server pauses before each chunk


def test_so_many_questions_run_at_once():
    with chatting(Chat(pause=0.05)) as chat:
        assert len(asked(chat, *[question(str(n)) for n in range(9)], at_once=3, temperature=0.5)) == 9
    assert chat.most_at_once == 3
    assert chat.requests[0]["seed"] == 7


@pytest.mark.parametrize("fault", [{"status": 400}, {"status": 500}, {"counts_tokens": False}])
def test_a_request_that_fails_is_counted_and_the_question_left(fault):
    with chatting(Chat(**fault)) as chat:
        replies = asked(chat, question("one", "two"), question("three"))
    assert [bool(reply.failure) for reply in replies] == [True, True]
    assert ("it is too warm" in replies[0].failure) == ("status" in fault)


TEXT, USAGE = {"choices": [{"delta": {"content": "a"}}]}, {"usage": {"completion_tokens": 3}}


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([USAGE], "held no text"),
        ([TEXT, {"usage": ["tokens"]}], "malformed"),
        ([TEXT, {"usage": {"completion_tokens": "many"}}], "malformed"),
        ([{"choices": ["a"]}, USAGE], "malformed"),
        ([{"choices": 1}, USAGE], "malformed"),
        ([{"choices": [{"delta": {"content": 1}}]}, USAGE], "malformed"),
        ([TEXT, {"sglext": [1]}, USAGE], "malformed"),
    ],
)
def test_a_stream_that_is_no_answer_is_a_failed_request(chunks, words):
    with chatting(Chat(kind="sglang", chunks=chunks)) as chat:
        [reply] = asked(chat, question("one"))
    assert words in reply.failure


def test_an_answer_of_fewer_tokens_than_passes_has_no_drafts():
    with chatting(Chat(kind="sglang", tokens=5, passes=6)) as chat:
        [reply] = asked(chat, question("one"))
    assert reply.accepted == Accepted(drafts=0, passes=6)


def test_a_connection_that_is_lost_keeps_what_was_answered():
    with chatting(Chat(dies_after=2)) as chat:
        replies = list[Reply]()
        found = Server(url=chat.url, model="m", kind="other")
        questions = [question(str(n)) for n in range(5)]
        with pytest.raises(EngineError, match="connection was lost"):
            asyncio.run(server.ask(found, questions, 1, Sampling(max_new_tokens=16), 0, replies.append))
    assert len(replies) == 2


# The command


def benchmark(chat: Chat, *more: object) -> tuple[str, dict]:
    command = ["benchmark", "--server", chat.url, "--output", "out.json", "--concurrency", "1 3", "--num-prompts", 7]
    found = CliRunner().invoke(cli.app, [str(text) for text in (*command, *more)])
    assert found.exit_code == 0, found.output
    return found.output, json.loads(Path("out.json").read_text())


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("kind", "source"),
    [("sglang", "requests"), ("old-sglang", "average since the server's start"), ("vllm", "counters")],
)
def test_a_servers_own_accepted_length_is_read(kind, source):
    with chatting(Chat(kind=kind)) as chat:
        output, result = benchmark(chat)
    served = result["served"]
    assert served["acceptance_length"] == pytest.approx(2.5)
    assert served["acceptance_source"] == source
    assert [level["concurrency"] for level in served["levels"]] == [1, 3]
    assert all(level["failed"] == 0 and level["tokens"] == 16 * level["requests"] for level in served["levels"])
    assert "2.500" in output
    assert "warning" not in output
    assert "partial" not in result
    if kind == "sglang":
        assert served["speculative"] == {"algorithm": "EAGLE3", "steps": 3, "topk": 1, "draft_tokens": 4}
        assert set(served["by_domain"]) >= {"code", "maths", "multi-turn"}
        assert served["levels"][0]["acceptance_length"] == pytest.approx(2.5)
    if kind == "vllm":  # only what was added meanwhile, the first answer warmed up
        assert served["levels"][0]["acceptance_length"] == pytest.approx(2.5)


@pytest.mark.parametrize("kind", ["sglang", "vllm", "other"])
def test_a_server_without_a_draft_is_measured_with_one_warning(kind):
    with chatting(Chat(kind=kind, speculative=False)) as chat:
        output, result = benchmark(chat)
    assert output.count("warning") == 1
    assert "not reported" in output
    assert result["served"]["acceptance_length"] is None
    assert result["served"]["acceptance_source"] == "not reported"
    assert all(level["tokens_per_second"] > 0 for level in result["served"]["levels"])


# A server of our own, and the part in process


def launching(chat: Chat, monkeypatch) -> tuple[int, str, dict]:
    """(exit code, what was said, result) of --launch at two concurrencies, where `chat` is what starts."""
    monkeypatch.setattr(launched, "launched", lambda *_: contextlib.nullcontext(chat.url))
    command = "benchmark --launch --model-path m --output out.json --num-prompts 3 --max-new-tokens 8 --concurrency"
    found = CliRunner().invoke(cli.app, [*command.split(), "1 2"])
    return found.exit_code, found.output, json.loads(Path("out.json").read_text())


def test_our_own_server_forgets_its_prompts_before_each_level(monkeypatch):
    with chatting(Chat(kind="sglang")) as chat:
        code, output, result = launching(chat, monkeypatch)
    assert code == 0, output
    assert chat.flushed == len(result["served"]["levels"]) == 2


@pytest.mark.parametrize(("fault", "words"), [({"dies_at_flush": 2}, "disconnected"), ({"flush_status": 400}, "busy")])
def test_our_own_server_that_does_not_forget_ends_the_run(monkeypatch, fault, words):
    with chatting(Chat(kind="sglang", **fault)) as chat:
        Path("out.json").write_text("{}")
        code, output, result = launching(chat, monkeypatch)
    assert code == 2
    assert output.count("where:") == 1
    assert "/flush_cache" in output
    assert words in output
    assert result == {} or (result["partial"] is True and len(result["served"]["levels"]) == 1)


@pytest.fixture
def draft() -> Path:
    folder = Path("draft")
    folder.mkdir()
    (folder / "config.json").write_text('{"draft_vocab_size": 100}')
    Path("data").mkdir()
    return folder


OWN = {"teacher_forced": {"walk_length": 2.4}, "decode": {"acceptance_length": 2.5}, "questions": "builtin"}


@pytest.mark.parametrize(("code", "own"), [(0, OWN), (1, OWN), (2, None)])
def test_what_the_part_in_process_found_is_kept(monkeypatch, draft, code, own):
    def ran(command: list[str], **_: object) -> subprocess.CompletedProcess:
        given = json.loads(Path(command[-1]).read_text())
        assert "server" not in given
        assert Path(given["output"]).parent == Path("results")
        if own:
            Path(given["output"]).write_text(json.dumps(own))
        return subprocess.CompletedProcess(command, code)

    given = ["--draft", str(draft), "--model-path", "m", "--data", "data", "--output", "results/out.json"]
    with chatting(Chat(kind="sglang")) as chat:
        monkeypatch.setattr(subprocess, "run", ran)
        command = ["benchmark", "--server", chat.url, "--concurrency", "1", "--num-prompts", "2", *given]
        found = CliRunner().invoke(cli.app, command)
    assert found.exit_code == code, found.output
    result = json.loads(Path("results/out.json").read_text())
    assert result["served"]["acceptance_length"] == pytest.approx(2.5)
    assert result.get("decode") == (OWN["decode"] if own else None)
    assert ("partial" in result) == (own is None)
    assert os.listdir("results") == ["out.json"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--data none", "--data none"),
        ("--data data --features data", "--features data/test"),
        ("--data data --draft none", "--draft none"),
        ("--data data --draft data", "config.json"),
        ("--data data --steps 2 --draft-tokens 9", "--draft-tokens 9"),
        ("--data data --top-k 101", "--top-k 101"),
    ],
)
def test_what_the_part_in_process_refuses_is_refused_before_the_server_is_asked(draft, given, named):
    with chatting(Chat()) as chat:
        command = ["benchmark", "--server", chat.url, "--model-path", "m", "--draft", str(draft), *given.split()]
        found = CliRunner().invoke(cli.app, command)
    assert found.exit_code == 2
    assert named in found.output
    assert not chat.requests


def test_a_server_is_killed_though_the_wait_for_its_end_is_cut_short(monkeypatch):
    command = ["bash", "-c", "trap '' TERM; echo ready; sleep 60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    wait = process.wait

    def cut(seconds: float | None = None) -> int:
        if seconds is not None:
            raise KeyboardInterrupt
        return wait()

    monkeypatch.setattr(process, "wait", cut)
    with pytest.raises(KeyboardInterrupt):
        launched._end(process)
    assert process.returncode == -signal.SIGKILL


def test_a_terminal_that_hangs_up_leaves_a_partial_result():
    settings = BenchmarkSettings(server="http://127.0.0.1:9", output=Path("out.json"))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended, serving._kept(settings, {"served": {"levels": [1]}}):
            signal.raise_signal(signal.SIGHUP)
        assert ended.value.code == 129
        assert json.loads(Path("out.json").read_text())["partial"] is True
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        with serving._kept(settings, {}):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_server_alone_needs_no_torch():
    code = (
        "import sys; from specforge import cli; "
        "code = cli.execute('benchmark', cli.SETTINGS['benchmark'], {'server': sys.argv[1], 'num_prompts': 2, "
        "'concurrency': (1,)}); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    with chatting(Chat()) as chat:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code, chat.url], env=environment, check=True, timeout=60)
