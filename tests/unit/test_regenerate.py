"""Answers turn by turn: what becomes of a conversation, the progress file, the draws, and the client of a server
(against a real HTTP server on loopback that answers as each test says)."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from specforge import cli
from specforge.data import regenerate_server
from specforge.data.dialogue import Dialogue, seed_of
from specforge.data.finished import Finished
from specforge.data.formats import parse, to_row
from specforge.data.regenerate_server import ServerRegenerator
from specforge.endpoint import model_name
from specforge.errors import ConfigError, EngineError
from specforge.records import Conversation, Message, Sampling
from specforge.target.sampling import ended, generator, next_tokens
from tests import tiny

ROOT = Path(__file__).parents[2]
MADE_FROM = {"prompts": "a1", "engine": "server", "model": "m", "max_new_tokens": 8, "temperature": 0.0, "seed": 0}


def conversation(*turns: str) -> Conversation:
    """Turns as 'role: text', or a role alone."""
    split = [turn.partition(": ") for turn in turns]
    return Conversation(id="c", messages=tuple(Message(role=role, content=text or role) for role, _, text in split))


def said(asked: Conversation | None) -> list[str]:
    return [f"{message.role}: {message.content}" for message in asked.messages] if asked else []


def answered(dialogue: Dialogue, text: str, special: list[str] | None = None) -> None:
    assert dialogue.asked()
    dialogue.answer(Message(role="assistant", content=text), 3, special)


# What becomes of a conversation


def test_every_user_turn_is_answered_and_the_answers_are_the_history():
    given = conversation(
        "system: be kind", "user: one", "assistant: old", "user: two", "assistant: older", "user: three"
    )
    dialogue = Dialogue(4, given)
    assert said(dialogue.asked()) == ["system: be kind", "user: one"]
    answered(dialogue, "1")
    assert said(dialogue.asked()) == ["system: be kind", "user: one", "assistant: 1", "user: two"]
    answered(dialogue, "2")
    answered(dialogue, "3")
    assert dialogue.asked() is None
    outcome = dialogue.outcome()
    assert said(outcome.conversation) == [
        *("system: be kind", "user: one", "assistant: 1", "user: two", "assistant: 2", "user: three", "assistant: 3")
    ]
    assert (outcome.index, outcome.id, outcome.answers, outcome.tokens, outcome.failure) == (4, "c", 3, 9, None)


def test_turns_of_others_stay_where_they_were():
    dialogue = Dialogue(
        0, conversation("assistant: hello", "user: a", "system: now briefly", "user: b", "assistant: x")
    )
    assert said(dialogue.asked()) == ["user: a", "system: now briefly"]  # who greets first was not asked
    answered(dialogue, "1")
    assert said(dialogue.asked()) == ["user: a", "system: now briefly", "assistant: 1", "user: b"]


@pytest.mark.parametrize("fail", ["truncated", "special", "empty", "server"])
def test_a_conversation_ends_before_the_turn_that_failed(fail):
    for whole in (0, 1):
        dialogue = Dialogue(0, conversation("user: a", "assistant: x", "user: b", "assistant: y", "user: c"))
        for number in range(whole):
            answered(dialogue, str(number))
        if fail == "truncated":
            dialogue.truncate(8, "so far")
        elif fail == "special":
            answered(dialogue, "well<|channel|>so", ["<|im_end|>", "<|channel|>"])
        elif fail == "empty":
            answered(dialogue, " \n")
        else:
            dialogue.fail("failed", "the server failed")
        outcome = dialogue.outcome()
        assert dialogue.asked() is None
        assert said(outcome.conversation) == ["user: a", "assistant: 0"][: 2 * whole]
        assert outcome.failure.turn == whole + 1
        assert outcome.failure.kind == ("truncated" if fail == "truncated" else "failed")
        assert outcome.failure.produced == {"truncated": "so far", "special": "well<|channel|>so"}.get(fail, "")
    assert fail != "special" or "<|channel|>" in outcome.failure.reason


def test_a_turn_that_used_tools_is_not_answered():
    dialogue = Dialogue(0, conversation("user: a", "assistant: x", "user: b", "assistant: call", "tool: 7", "user: c"))
    answered(dialogue, "1")
    assert dialogue.asked() is None
    outcome = dialogue.outcome()
    assert said(outcome.conversation) == ["user: a", "assistant: 1"]
    assert outcome.failure.turn == 2
    assert "tools" in outcome.failure.reason
    assert Dialogue(0, conversation("user: a", "assistant: call", "tool: 7", "assistant: 7")).asked() is None
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    unanswered = (Message(role="user", content="a"), Message(role="assistant", content="", tool_calls=(call,)))
    assert Dialogue(0, Conversation(id="c", messages=unanswered)).asked() is None


def test_what_else_a_conversation_holds_is_kept():
    user = Message(role="user", content="a", name="Ann")
    given = Conversation(id="c", messages=(user,), tools=({"name": "f"},), source="s")
    dialogue = Dialogue(0, given)
    assert dialogue.asked() == given
    dialogue.answer(Message(role="assistant", content="b", reasoning="r"), 1, None)
    answer = Message(role="assistant", content="b", reasoning="r")
    assert dialogue.outcome().conversation == replace(given, messages=(user, answer))


def test_special_tokens_are_noticed_by_their_look_where_no_tokenizer_is_given():
    for text, special in (
        ("a <|im_end|> b", True),
        ("a <｜tool▁calls▁begin｜>", True),
        ("if a <b| and |c> d: |x|", False),
    ):
        dialogue = Dialogue(0, conversation("user: a"))
        answered(dialogue, text, None)
        assert (dialogue.outcome().failure is not None) == special
    dialogue = Dialogue(0, conversation("user: a"))
    answered(dialogue, "a <|im_end|> b", ["</s>"])  # known not to be one of this target's
    assert dialogue.outcome().failure is None


# The progress file


def outcome(index: int, again: bool = False, failed: bool = False):
    dialogue = Dialogue(index, conversation(f"user: {index}", "user: more"))
    answered(dialogue, f"answer \u2028 {index}")
    if failed or again:
        dialogue.fail("failed", "reason", again=again)
    else:
        answered(dialogue, "second")
    return dialogue.outcome()


def begun(path: Path, *outcomes, made_from=MADE_FROM) -> Finished:
    finished = Finished(path, made_from, resume=True)
    finished.open()
    for one in outcomes:
        finished.add(one)
    finished.close()
    return finished


def test_output_is_in_the_order_of_the_prompts_whatever_the_order_of_ending(tmp_path):
    path = tmp_path / "p"
    begun(path, outcome(2), outcome(0, failed=True))
    summary = begun(path, outcome(1)).write(tmp_path / "out", tmp_path / "failed")
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().split("\n") if line]
    assert [row["conversations"][0]["content"] for row in rows] == ["0", "1", "2"]
    assert [len(row["conversations"]) for row in rows] == [2, 4, 4]
    assert (summary.kept, summary.cut_short, summary.truncated, summary.failed, summary.answers) == (3, 1, 0, 1, 5)
    failed = [json.loads(line) for line in (tmp_path / "failed").read_text().splitlines()]
    assert failed == [{"id": "c", "turn": 2, "kind": "failed", "reason": "reason", "produced": ""}]
    assert not path.exists()


def test_a_torn_last_line_is_forgotten_wherever_it_was_torn(tmp_path):
    path = tmp_path / "p"
    begun(path, outcome(0), outcome(1))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        finished = Finished(path, MADE_FROM, resume=True)
        assert finished.done() == sum(size >= len(b"".join(lines[: n + 1])) for n in (1, 2))
        finished.open()
        for index in (0, 1):
            if not finished.is_done(index):
                finished.add(outcome(index))
        finished.close()
        assert path.read_bytes() == whole


def test_damage_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "p"
    begun(path, outcome(0), outcome(1))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0" * 9 + b"\n" + lines[2])
    with pytest.raises(ConfigError, match="damaged"):
        Finished(path, MADE_FROM, resume=True)


@pytest.mark.parametrize("name", MADE_FROM)
def test_going_on_with_other_settings_is_refused_by_name(tmp_path, name):
    path = tmp_path / "p"
    begun(path, outcome(0))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=f"another {name}: .*now other") as refused:
        Finished(path, MADE_FROM | {name: "other"}, resume=True)
    assert "--no-resume" in str(refused.value)
    assert path.read_bytes() == before
    anew = Finished(path, MADE_FROM | {name: "other"}, resume=False)
    anew.open()
    anew.close()
    assert Finished(path, MADE_FROM | {name: "other"}, resume=True).done() == 0


def test_what_a_server_failed_is_tried_again(tmp_path):
    path = tmp_path / "p"
    begun(path, outcome(0, again=True), outcome(1, failed=True))
    finished = Finished(path, MADE_FROM, resume=True)
    assert [finished.is_done(index) for index in (0, 1, 2)] == [False, True, False]
    assert begun(path, outcome(0)).is_done(0)
    assert Finished(path, MADE_FROM, resume=True).is_done(0)


def test_two_processes_do_not_write_the_same_output(tmp_path):
    first = Finished(tmp_path / "p", MADE_FROM, resume=True)
    first.open()
    with pytest.raises(ConfigError, match="another process"):
        Finished(tmp_path / "p", MADE_FROM, resume=False).open()
    first.add(outcome(0))
    first.close()
    assert Finished(tmp_path / "p", MADE_FROM, resume=True).done() == 1


# Draws

LOGITS_V = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])


def drawn(sampling: Sampling, count: int, seed: int = 0) -> torch.Tensor:
    source = generator(seed, torch.device("cpu"))
    return torch.cat([next_tokens(LOGITS_V[None], sampling, [source]) for _ in range(count)])


def test_draws_follow_the_distribution():
    """4,000 draws: a share of p has a standard deviation of at most 0.008; without the temperature the shares are up to
    0.13 apart."""
    for temperature in (0.5, 1.0, 2.0):
        shares = drawn(Sampling(max_new_tokens=1, temperature=temperature), 4000).bincount(minlength=5) / 4000
        torch.testing.assert_close(shares, (LOGITS_V / temperature).softmax(-1), rtol=0, atol=0.04)


def test_top_p_draws_from_the_fewest_tokens_that_reach_it():
    probability = LOGITS_V.softmax(-1)  # 0.46, 0.17, 0.06, 0.02, 0.28: in order 0, 4, 1, 2, 3
    for top_p, kept in (
        (0.01, [0]),
        (0.45, [0]),
        (0.5, [0, 4]),
        (0.73, [0, 4]),
        (0.8, [0, 1, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ):
        found = drawn(Sampling(max_new_tokens=1, temperature=1.0, top_p=top_p), 2000).bincount(minlength=5) / 2000
        assert found.nonzero().flatten().tolist() == kept
        wanted = torch.zeros(5).index_copy(0, torch.tensor(kept), probability[kept] / probability[kept].sum())
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.05)  # 4 standard deviations


def test_draws_depend_on_their_own_seed_alone():
    sampling = Sampling(max_new_tokens=1, temperature=1.0, top_p=0.95)
    alone = [next_tokens(LOGITS_V[None], sampling, [generator(seed, torch.device("cpu"))]) for seed in range(20)]
    together = next_tokens(
        LOGITS_V.expand(20, 5), sampling, [generator(seed, torch.device("cpu")) for seed in range(20)]
    )
    assert torch.equal(torch.cat(alone), together)
    assert len(set(together.tolist())) > 1
    seeds = {seed_of(seed, index, turn) for seed in range(20) for index in range(20) for turn in range(20)}
    assert len(seeds) == 8000


def test_temperature_0_is_greedy_and_rounding_hardly_ever_changes_a_draw():
    assert next_tokens(LOGITS_V[None], Sampling(max_new_tokens=1), []).tolist() == [0]
    generator_ = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(500, 5000, generator=generator_)
    sampling, seeds = Sampling(max_new_tokens=1, temperature=1.0, top_p=0.9), range(500)
    one, two = (
        next_tokens(logits, sampling, [generator(seed, torch.device("cpu")) for seed in seeds])
        for logits in (logits_BV, logits_BV + 1e-6 * torch.randn(500, 5000, generator=generator_))
    )
    assert (one != two).sum() <= 1


def test_an_answer_ends_with_a_stop_token_or_at_its_longest():
    sampling = Sampling(max_new_tokens=3, stop_ids=(7, 8))
    assert [ended(answer, sampling) for answer in ([], [1], [7], [1, 8], [7, 1], [1, 2, 3])] == [
        *(False, False, True, True, False, True)
    ]


# The client of a server


class Server:
    """An OpenAI-compatible server on loopback whose answers the test writes: from (request, number) to a status and a
    body, or to the text of an answer."""

    def __init__(self, reply: Callable[[dict, int], object], models: object = None) -> None:
        outer, self.requests, lock = self, list[dict](), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version, wbufsize = "HTTP/1.1", 1 << 16

            def do_GET(self):
                self.send(200, models or {"data": [{"id": "served"}]})

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(request)
                    found = reply(request, len(outer.requests))
                self.send(*found) if isinstance(found, tuple) else self.send(200, completion(found))

            def send(self, status, body, headers=()):
                content = json.dumps(body).encode() if not isinstance(body, bytes) else body
                self.send_response(status)
                for name, value in (*headers, ("Content-Length", str(len(content)))):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def completion(content: str | None, finish: str = "stop", **message: object) -> dict:
    message = {"role": "assistant", "content": content, **message}
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": {"completion_tokens": 2}}


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(regenerate_server, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(reply, models=None):
        servers.append(Server(reply, models))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def ask(server: Server, given: list[Conversation], at_once: int = 4, sampling: Sampling | None = None) -> list:
    found = []
    asking = ServerRegenerator(server.url, "served", sampling or Sampling(max_new_tokens=8), 0, None)
    asyncio.run(asking.run([Dialogue(at, one) for at, one in enumerate(given)], at_once, found.append))
    return sorted(found, key=lambda one: one.index)


def echo(request: dict, number: int) -> str:
    return " / ".join(message["content"] for message in request["messages"])


def test_a_server_is_asked_turn_by_turn(serve):
    server = serve(echo)
    given = [conversation("system: s", f"user: {n}", "assistant: old", "user: more") for n in range(30)]
    for number, one in enumerate(ask(server, given)):
        first = f"s / {number}"
        want = ["system: s", f"user: {number}", f"assistant: {first}", "user: more"]
        assert said(one.conversation) == [*want, f"assistant: {first} / {first} / more"]
        assert (one.failure, one.tokens) == (None, 4)
    assert len(server.requests) == 60
    assert {key: value for key, value in server.requests[0].items() if key != "messages"} == {
        **{"model": "served", "max_tokens": 8, "temperature": 0.0, "skip_special_tokens": False}
    }


def test_reasoning_stays_apart_and_tools_are_offered(serve):
    server = serve(lambda request, number: (200, completion("b", reasoning_content="so")))
    given = Conversation(id="c", messages=(Message(role="user", content="a"),) * 2, tools=({"name": "f"},))
    (found,) = ask(server, [given])
    assert [message.reasoning for message in found.conversation.messages] == [None, "so", None, "so"]
    assert server.requests[1]["tools"] == [{"name": "f"}]
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": "b", "reasoning_content": "so"}


def test_reasoning_may_have_its_newer_name(serve):
    server = serve(lambda request, number: (200, completion("b", reasoning="so")))
    given = Conversation(id="c", messages=(Message(role="user", content="a"),), kwargs={"enable_thinking": True})
    (found,) = ask(server, [given])
    assert found.conversation.messages[1].reasoning == "so"
    assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": True}


def test_exact_tokens_go_on_in_a_row_as_long_as_the_prompt_does():
    turns = tuple(Message(role="user", content=text) for text in "abc")
    dialogue = Dialogue(0, Conversation(id="c", messages=turns), "hash")
    fed = ([1, 2], [1, 2, 3, 4, 5], [1, 9])  # the third prompt is another text
    for asked, written in zip(fed, ([3, 4], [6], [7, 8]), strict=True):
        assert dialogue.asked() is not None
        dialogue.answer(Message(role="assistant", content="x"), len(written), [], (asked, written))
    found = dialogue.outcome().conversation
    assert found.tokenizer_hash == "hash"
    assert [(row.token_ids, row.loss_mask) for row in found.rows] == [
        ([1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 0, 1]),
        ([1, 9, 7, 8], [0, 0, 1, 1]),
    ]
    assert parse(json.loads(json.dumps(to_row(found))), "c")[1] == found


def test_at_a_temperature_each_turn_has_its_own_seed(serve):
    server = serve(echo)
    given = [conversation("user: a", "user: b"), conversation("user: a")]
    for _ in range(2):
        ask(server, given, sampling=Sampling(max_new_tokens=8, temperature=0.7, top_p=0.9))
    seeds = [{request["seed"] for request in server.requests[half]} for half in (slice(3), slice(3, 6))]
    assert seeds[0] == seeds[1]
    assert len(seeds[0]) == 3
    assert all(request["top_p"] == 0.9 for request in server.requests)


def test_many_requests_are_in_flight(serve):
    gate = threading.Barrier(6, timeout=20)
    server = serve(echo)
    inner = server.http.RequestHandlerClass.do_POST
    server.http.RequestHandlerClass.do_POST = lambda handler: (gate.wait(), inner(handler))
    assert all(one.conversation for one in ask(server, [conversation("user: a")] * 12, at_once=6))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_fails_twice_is_asked_again(serve, status):
    server = serve(lambda request, number: (status, {"error": {"message": "busy"}}) if number <= 2 else "fine")
    (found,) = ask(server, [conversation("user: a")])
    assert said(found.conversation) == ["user: a", "assistant: fine"]
    assert len(server.requests) == 3


def test_the_wait_that_a_server_asks_for_is_kept(serve, monkeypatch):
    waits = []
    monkeypatch.setattr(regenerate_server.asyncio, "sleep", lambda seconds: waits.append(seconds) or _nothing())
    server = serve(lambda request, number: (429, {}, [("Retry-After", "7")]) if number == 1 else "fine")
    ask(server, [conversation("user: a")], at_once=1)
    assert waits == [7.0]


async def _nothing():
    pass


def test_one_request_that_always_fails_is_recorded_to_be_tried_again(serve):
    server = serve(lambda request, number: (500, b"boom") if echo(request, number) == "bad" else "fine")
    given = [conversation(f"user: {text}") for text in ["good", "bad", "good"]]
    found = ask(server, given)
    assert [one.conversation is not None for one in found] == [True, False, True]
    assert found[1].failure.again
    assert "HTTP 500: boom" in found[1].failure.reason
    assert len(server.requests) == 2 + regenerate_server.TRIES


def test_a_server_that_always_fails_ends_the_run(serve):
    server = serve(lambda request, number: (500, {"error": {"message": "out of memory"}}))
    with pytest.raises(EngineError, match=r"10 requests in a row failed.*out of memory"):
        ask(server, [conversation("user: a")] * 100)
    assert len(server.requests) < 100


@pytest.mark.parametrize(
    ("reply", "kind", "reason"),
    [
        ((400, {"message": "the input is longer than the context"}), "failed", "HTTP 400: the input is longer"),
        ((200, completion("so far", "length")), "truncated", "no end of turn within 8 tokens"),
        ((200, completion("a<|channel|>b")), "failed", "<|channel|>"),
        ((200, completion(None)), "failed", "empty"),
        ((200, completion("b", reasoning_content="a<|channel|>")), "failed", "<|channel|>"),
        ((200, completion("call", tool_calls=[{"id": "1"}])), "failed", "called a tool"),
        ((200, completion("x", "content_filter")), "failed", "content_filter"),
        ((200, {"choices": []}), "failed", "the server failed"),
        ((200, b"<html>"), "failed", "the server failed"),
    ],
)
def test_what_is_no_answer_is_recorded_with_its_reason(serve, reply, kind, reason):
    (found,) = ask(serve(lambda request, number: reply), [conversation("user: a")])
    assert found.conversation is None
    assert found.failure.kind == kind
    assert reason in found.failure.reason


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_answers_nobody_ends_the_run(serve, status):
    with pytest.raises(EngineError, match=f"HTTP {status}"):
        ask(serve(lambda request, number: (status, {})), [conversation("user: a")])


def test_the_model_is_the_one_that_is_served(serve):
    two = {"data": [{"id": "one"}, {"id": "two"}]}
    assert model_name(serve(echo).url, "elsewhere") == "served"
    assert model_name(serve(echo, two).url + "/v1/", "two") == "two"
    with pytest.raises(EngineError, match="2 models: one, two"):
        model_name(serve(echo, two).url, None)
    for models in ({"data": []}, {"models": 1}, [1], b"<html>"):
        with pytest.raises(EngineError, match="cannot be used"):
            model_name(serve(echo, models).url, None)


# The command with a server


def command(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(cli.app, ["regenerate", *map(str, arguments)])
    return found.exit_code, " ".join(found.output.split())


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.write_jsonl(tmp_path / "prompts.jsonl", tiny.conversations(20))


def test_a_server_that_dies_in_mid_run_loses_nothing(serve, prompts):
    unbroken = serve(echo)
    assert command("--server", unbroken.url, "--prompts", prompts, "--output", "whole.jsonl")[0] == 0
    dying = serve(lambda request, number: echo(request, number) if number <= 15 else dying.http.server_close() or 1 / 0)
    given = ["--prompts", prompts, "--output", "out.jsonl", "--concurrency", 2]
    dying.http.handle_error = lambda *arguments: None
    code, output = command("--server", dying.url, *given)
    assert code == 2
    assert output.count("where:") == output.count("fix:") == 1
    assert "the same command goes on" in output
    assert not Path("out.jsonl").exists()
    kept = len(Path("out.jsonl.progress.jsonl").read_text().splitlines()) - 1
    assert 0 < kept < 20
    again = serve(echo)
    code, output = command("--server", again.url, *given)
    assert f"going on: {kept} of 20" in output
    assert len(again.requests) == 2 * (20 - kept)
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert sorted(path.name for path in Path().iterdir()) == ["out.jsonl", "prompts.jsonl", "whole.jsonl"]


def test_nothing_is_written_where_nothing_was_answered(serve, prompts):
    server = serve(lambda request, number: (200, completion("so far", "length")))
    Path("out.jsonl").write_text("of an earlier run")
    code, output = command("--server", server.url, "--prompts", prompts, "--output", "out.jsonl")
    assert code == 2
    assert "20 truncated" in output
    assert Path("out.jsonl").read_text() == "of an earlier run"
    assert len(Path("out.jsonl.failed.jsonl").read_text().splitlines()) == 20
    assert not Path("out.jsonl.progress.jsonl").exists()


def test_resuming_a_run_with_another_model_is_refused(serve, prompts):
    broken = serve(lambda request, number: (500, {}) if number > 4 else "fine")
    given = ["--prompts", prompts, "--output", "out.jsonl", "--concurrency", 1]
    assert command("--server", broken.url, *given)[0] == 2
    code, output = command("--server", serve(echo, {"data": [{"id": "other"}]}).url, *given)
    assert code == 2
    assert "another model: served, now other" in output
    code, output = command("--server", serve(echo).url, *given, "--temperature", 0.5)
    assert code == 2
    assert "another temperature: 0.0, now 0.5" in output
    assert command("--server", serve(echo).url, *given, "--temperature", 0.5, "--no-resume")[0] == 0


def test_with_a_server_no_torch_is_imported(serve, prompts):
    code = """
import sys
from specforge import cli
sys.argv = ["specforge", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as end:
    print("END", end.code, sorted({"torch", "transformers", "sglang", "deepspeed"} & set(sys.modules)))
"""
    tiny.tokenizer().save_pretrained("target")
    given = ["regenerate", "--server", serve(echo).url, "--prompts", "prompts.jsonl", "--output", "out.jsonl"]
    found = subprocess.run(
        [sys.executable, "-c", code, *given, "--model-path", "target"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "END 0 []" in found.stdout, found.stdout + found.stderr
    assert Path("out.jsonl").exists()


# What is refused


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--prompts none.jsonl --server http://127.0.0.1:9", "none.jsonl"),
        ("--prompts prompts.jsonl --output prompts.jsonl --server http://127.0.0.1:9", "--output prompts.jsonl"),
        ("--prompts out.jsonl.failed.jsonl --server http://127.0.0.1:9", "--output out.jsonl"),
        ("--prompts prompts.jsonl --output . --server http://127.0.0.1:9", "--output ."),
        ("--prompts prompts.jsonl --server http://127.0.0.1:9", "--server http://127.0.0.1:9"),
        ("--prompts prompts.jsonl --server 127.0.0.1", "--server 127.0.0.1"),
        ("--prompts prompts.jsonl --server http://[", "--server http://["),
        ("--prompts prompts.jsonl --server URL --model-path .", "--model-path ."),
        ("--prompts prompts.jsonl --server URL --tp-size 2 --dtype float32", "--dtype, --tp-size"),
        ("--prompts prompts.jsonl --server URL --output prompts.jsonl/out.jsonl", "prompts.jsonl"),
        ("--prompts prompts.jsonl", "--model-path, --server"),
        ("--prompts prompts.jsonl --server URL --temperature -0.1", "--temperature"),
        ("--prompts prompts.jsonl --server URL --temperature nan", "--temperature"),
        ("--prompts prompts.jsonl --server URL --top-p 0", "--top-p"),
        ("--prompts prompts.jsonl --server URL --top-p 1.1", "--top-p"),
        ("--prompts prompts.jsonl --server URL --seed -1", "--seed"),
        ("--prompts prompts.jsonl --server URL --concurrency 0", "--concurrency"),
        ("--prompts prompts.jsonl --server URL --max-new-tokens 0", "--max-new-tokens"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(serve, prompts, arguments, named):
    before = {path: path.stat().st_mtime_ns for path in Path().iterdir()}
    given = arguments.replace("URL", serve(echo).url).split()
    code, output = command(*([] if "--output" in given else ["--output", "out.jsonl"]), *given)
    assert code == 2, output
    assert output.count("where:") == output.count("fix:") == 1
    assert named in output.split("where:")[1].split("fix:")[0]
    assert {path: path.stat().st_mtime_ns for path in Path().iterdir()} == before
