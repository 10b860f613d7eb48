"""Chat templates that never end or want all memory: refused in time, and the process is as it was before."""

from __future__ import annotations

import json
import resource
import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specforge import cli
from specforge.config import DataSettings
from specforge.console import harmless
from specforge.data import limits
from specforge.data.tokenize import ChatTokenizer
from specforge.errors import ConfigError
from specforge.records import Conversation, Message
from tests import tiny
from tests.faults.page import fault

MINE = "{% if messages[0].content == 'evil' %}PLACE{% endif %}" + tiny.CHATML
HOSTILE = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'x' * 20000000000 }}",
    "a long list": "{{ ([1] * 5000000000) | length }}",
    "a wide field": "{{ '%09999999999d' % 1 }}",
    "centred": "{{ 'x' | center(9999999999) }}",
    "doubled again and again": "{% set n = namespace(t='x' * 1000) %}{% for i in range(60) %}{% set n.t = n.t + n.t %}"
    "{% endfor %}",
    "a range without end": "{% for a in range(10 ** 12) %}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a division by zero": "{{ 1 / 0 }}",
    "much output": "{% set big = 'x' * 1000000 %}{% for i in range(90) %}{{ big }}{% endfor %}",
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 1.0)


def folder_with(path: Path, template: str) -> str:
    tiny.tokenizer(chat_template=template).save_pretrained(path)
    return str(path)


def conversation(asked: str) -> Conversation:
    turns = (Message(role="user", content=asked), Message(role="assistant", content="the cat runs."))
    return Conversation(id="", messages=turns)


@pytest.mark.parametrize("name", HOSTILE)
@fault(
    "a chat template loops for ever, or makes gigabytes, for some rows",
    "those rows are dropped and counted",
)
def test_a_template_that_is_hostile_to_some_rows_costs_those_rows(tmp_path, name):
    tokenizer = ChatTokenizer(folder_with(tmp_path, MINE.replace("PLACE", HOSTILE[name])))
    began, before = time.monotonic(), resource.getrlimit(resource.RLIMIT_AS)
    good, evil = tokenizer.examples([conversation("hello"), conversation("evil")], DataSettings(max_length=512))
    assert time.monotonic() - began < 5
    assert not isinstance(good, str)
    assert isinstance(evil, str)
    assert evil.startswith(("the template refuses it", "the template cannot take it"))
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("name", ["loops in loops", "a long text"])
@fault(
    "the same for all rows",
    "refused at the start",
)
def test_a_template_that_is_hostile_to_all_is_refused_at_once(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot be used: it wants more than"):
        ChatTokenizer(folder_with(tmp_path, HOSTILE[name]))


@fault(
    "a template or a row holds escape codes",
    "they are shown as text",
)
def test_markup_and_controls_of_a_template_do_not_reach_the_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    template = "{{ raise_exception('[red]boo[/] \x1b[2J\x1b]0;mine\x07') }}"
    tiny.make_target(Path("target"))
    folder_with(Path("target"), template)
    tiny.write_jsonl(Path("rows.jsonl"), tiny.conversations(20))
    given = "--dataset rows.jsonl --model-path target --output data --workers 1"
    found = CliRunner().invoke(cli.app, ["prepare-data", *given.split()])
    assert "[red]boo[/]" in found.output
    assert "\x1b" not in found.output
    assert "\x07" not in found.output
    assert json.loads(json.dumps(harmless("a\tb\nc\u202e\x9b"))) == "a\tb\nc\ufffd\ufffd"
