"""A server that answers with what no client should believe: each request becomes a recorded failure, in time, and
nothing of it reaches the terminal raw."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specforge import cli, endpoint
from specforge.data import regenerate_server
from tests import tiny
from tests.faults.page import fault

GOOD = {"choices": [{"message": {"content": "yes."}, "finish_reason": "stop"}], "usage": {"completion_tokens": 2}}


def reply(**message: object) -> bytes:
    return json.dumps(GOOD | {"choices": [{"message": message, "finish_reason": "stop"}]}).encode()


HOSTILE: dict[str, tuple[bytes, dict[str, str]]] = {
    "nested": (b"[" * 200_000, {}),
    "nested in the content": (b'{"choices": [{"message": {"content": ' + b"[" * 100_000, {}),
    "usage is a word": (json.dumps(GOOD | {"usage": {"completion_tokens": "abc"}}).encode(), {}),
    "usage without end": (json.dumps(GOOD).replace(": 2", ": 1e999").encode(), {}),
    "false gzip": (b"\x1f\x8bnot at all", {"Content-Encoding": "gzip"}),
    "content is a list": (reply(content=[{"type": "text", "text": "yes"}]), {}),
    "reasoning is a list": (reply(content="yes", reasoning_content=["a"]), {}),
    "a lone surrogate": (reply(content="PLACE").replace(b"PLACE", b"\\ud800"), {}),
    "bytes that are no text": (reply(content="PLACE").replace(b"PLACE", b"\xff\xfe"), {}),
    "no choices": (json.dumps(GOOD | {"choices": []}).encode(), {}),
    "a number": (b"7", {}),
    "without end": (b"", {"X-Endless": "1"}),
    "a bomb": (gzip.compress(b"[" + b" " * (1 << 23) + b"]"), {"Content-Encoding": "gzip"}),
}


@contextmanager
def serving(bad: bytes, headers: dict[str, str], model: str = "m") -> Iterator[str]:
    """Answers whatever mentions "bad" with these bytes, all else well."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(json.dumps({"data": [{"id": model}]}).encode(), {})

        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(bad if b"bad" in asked else json.dumps(GOOD).encode(), headers if b"bad" in asked else {})

        def answer(self, body: bytes, more: dict[str, str]) -> None:
            self.send_response(200)
            for name, value in more.items():
                self.send_header(name, value)
            if "X-Endless" not in more:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body)
                while "X-Endless" in more:
                    self.wfile.write(b" " * 65536)
            except OSError:
                pass

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def limits(tmp_path, monkeypatch):
    """As they are, but reached in a moment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(endpoint, "MOST_BODY", 1 << 22)
    monkeypatch.setattr(regenerate_server, "FIRST_WAIT", 0.01)
    rows = [
        {
            "id": name,
            "conversations": [{"role": "user", "content": f"a {name} one"}, {"role": "assistant", "content": ""}],
        }
        for name in ("good", "bad")
    ]
    tiny.write_jsonl(Path("prompts.jsonl"), rows)


def regenerate(url: str, output: str = "out.jsonl") -> tuple[int, str]:
    command = ["regenerate", "--server", url, "--prompts", "prompts.jsonl", "--output", output]
    found = CliRunner().invoke(cli.app, command)
    return found.exit_code, found.output


@pytest.mark.parametrize("name", HOSTILE)
@fault(
    "a server answers with deep, endless, compressed or ill-typed content",
    "a recorded failure of that conversation, in time",
)
def test_a_hostile_answer_is_a_recorded_failure(name):
    began = time.monotonic()
    with serving(*HOSTILE[name]) as url:
        code, said = regenerate(url)
    assert time.monotonic() - began < 5
    assert "fault of specforge" not in said
    if name in ("false gzip", "without end", "a bomb"):  # as if the connection were lost: the run can go on later
        assert code == 2, said
        assert "tries without an answer" in said
        return
    assert code == 0, said
    (kept,) = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert kept["id"] == "good"
    (failed,) = [json.loads(line) for line in Path("out.jsonl.failed.jsonl").read_text().splitlines()]
    assert failed["id"] == "bad"


@fault(
    "a server's model name holds markup and escape codes; the URL a password",
    "the name is shown as text; the password is not shown",
)
def test_markup_of_a_model_and_a_password_are_not_shown():
    with serving(*HOSTILE["a number"], model="[red]m[/] \x1b[2J") as url:
        code, said = regenerate(url.replace("//", "//me:secret@"))
    assert code == 0, said
    assert "[red]m[/]" in said
    assert "\x1b" not in said
    assert "secret" not in said


def test_a_server_that_is_gone_does_not_tell_the_password():
    code, said = regenerate("http://me:secret@127.0.0.1:9")
    assert code == 2
    assert "secret" not in said
    assert "***@127.0.0.1:9" in said
