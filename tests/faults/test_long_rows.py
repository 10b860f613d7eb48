"""Rows of extraordinary length: time grows with them no faster than they do, or they are refused."""

from __future__ import annotations

import json
import time

import pytest

from specforge import cli, config
from specforge.data import serving_view
from specforge.data.formats import parse
from specforge.data.serving_view import View
from specforge.data.tokenize import ChatTokenizer
from tests import tiny
from tests.faults.page import fault

MEGABYTE = 1_000_000
WORDS = "the quick brown fox jumps over the lazy dog and runs away; "


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    tiny.make_target(folder)
    return folder


@pytest.mark.parametrize("unit", [WORDS, "a", "\n", "日本", "<|im_end|>"])
@fault(
    "a single line of 10 MB",
    "it takes as long as 10 MB of lines",
)
def test_a_line_of_ten_megabytes_takes_as_long_as_ten_megabytes_of_lines(target, tmp_path, unit):
    """Counted in work, not in seconds: the tokenizer gets each character once, and no conversation is rendered more
    than the few times that its turns take, however long it is."""
    text = unit * (10 * MEGABYTE // len(unit.encode()))
    rendered = []
    tokenizer = ChatTokenizer(str(target))
    once = tokenizer._limited
    tokenizer._limited = lambda *given: rendered.append(len(text := once(*given))) or text
    for turns in ([("user", text), ("assistant", "yes.")], [("user", "so"), ("assistant", text)]):
        row = {"conversations": [{"role": role, "content": content} for role, content in turns]}
        _, entry = parse(row, "1")
        assert isinstance(tokenizer._view(entry, "all-turns"), str | View)
    assert 2 * len(text) < sum(rendered) < 10 * len(text)


def test_a_row_of_ten_megabytes_costs_that_row(target, tmp_path):
    turns = [
        {"role": "user", "content": WORDS * (10 * MEGABYTE // len(WORDS))},
        {"role": "assistant", "content": "so."},
    ]
    tiny.write_jsonl(tmp_path / "rows.jsonl", [*tiny.conversations(20), {"conversations": turns}])
    given = {"dataset": str(tmp_path / "rows.jsonl"), "model_path": str(target), "output": tmp_path / "data"}
    assert cli.execute("prepare-data", config.PrepareDataSettings, given) == 0
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert "no whole turn within the maximum length" in json.dumps(report)


@fault(
    "a conversation of thousands of turns, each of which is rendered with all before it",
    "the row is left out and counted",
)
def test_a_conversation_of_thousands_of_turns_is_refused(target):
    """A conversation of n turns cost 2n renders of n turns: with 2,000 a minute."""
    tokenizer = ChatTokenizer(str(target), "mistral")
    turns = [{"role": role, "content": f"{role} {at}"} for at in range(1000) for role in ("user", "assistant")]
    began = time.process_time()
    said = [tokenizer._view(parse({"conversations": turns[:count]}, "1")[1], "all-turns") for count in (40, 2000)]
    assert isinstance(said[0], View)
    assert "more turns than can be rendered one by one" in str(said[1])
    assert time.process_time() - began < 30
    assert serving_view.MOST_RENDERED == 400_000
