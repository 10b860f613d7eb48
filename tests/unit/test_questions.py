"""Questions: our own set, files in every form, sets of the hub (from a hub of our own, in the real layouts)."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specforge.data import questions
from specforge.errors import ConfigError, DataError
from tests import hub_server
from tests.hub_server import Hub

ROOT = Path(__file__).parents[2]


def parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts(found) -> list[list[str]]:
    return [[message.content for message in question.messages] for question in found]


def test_the_own_set_covers_its_domains_and_is_spread_evenly():
    every = questions.load("builtin", 1000)
    assert 38 <= len(every) <= 45
    domains = {question.domain for question in every}
    assert domains == {"writing", "code", "maths", "reasoning", "extraction", "summarising", "multi-turn"}
    assert len({question.id for question in every}) == len({str(t) for t in texts(every)}) == len(every)
    assert all(len(q.messages) > 1 for q in every if q.domain == "multi-turn")
    assert {question.domain for question in questions.load("builtin", 7)} == domains
    assert questions.load("builtin", 0) == []


def test_rows_of_every_form(tmp_path):
    rows = [
        {"turns": ["a", "b"], "category": "maths", "question_id": 81},
        {"prompt": "c", "domain": "code"},
        {"question": "d", "answer": "5"},
        {"instruction": "e", "input": "f", "output": "g"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "h"}]},
        {"conversations": [{"from": "human", "value": v} if v != "j" else {"from": "gpt", "value": v} for v in "ijk"]},
    ]
    path = tmp_path / "own.jsonl"
    path.write_bytes(jsonl(rows))
    found = questions.load(str(path), 10)
    assert texts(found) == [["a", "b"], ["c"], ["d"], ["e\n\nf"], ["s", "h"], ["i", "k"]]  # without the answers
    assert [question.domain for question in found] == ["maths", "code", "own", "own", "own", "own"]
    assert found[0].id == "81"
    assert texts([questions.first_turn(found[0]), questions.first_turn(found[4])]) == [["a"], ["s", "h"]]


@pytest.mark.parametrize(
    "row", [{"text": "a"}, {"prompt": ""}, {"prompt": 5}, {"turns": ["a", " "]}, {"messages": [{"role": "system"}]}, {}]
)
def test_a_row_without_a_prompt_is_named(tmp_path, row):
    path = tmp_path / "own.jsonl"
    path.write_bytes(jsonl([{"prompt": "a"}, row]))
    with pytest.raises(DataError) as refused:
        questions.load(str(path), 10)
    assert refused.value.where == f"{path}, line 2"
    assert "no prompt" in refused.value.what


def test_a_name_that_is_nothing():
    with pytest.raises(ConfigError, match="did you mean mt_bench"):
        questions.load("mtbench", 1)
    with pytest.raises(DataError, match="not there"):
        questions.load("none.jsonl", 1)


SETS = {
    "mt_bench": (
        "raw/question.jsonl",
        jsonl([{"question_id": 111, "category": "math", "prompt": ["a", "b"], "reference": ["c", "d"]}]),
        [["math", ["a", "b"]]],
    ),
    "humaneval": (
        "openai_humaneval/test-00000-of-00001.parquet",
        parquet([{"task_id": "HumanEval/0", "prompt": "def f():", "canonical_solution": "x"}]),
        [["humaneval", ["Complete this Python function:\n\ndef f():"]]],
    ),
    "gsm8k": (
        "main/test-00000-of-00001.parquet",
        parquet([{"question": "a", "answer": "b"}]),
        [["gsm8k", ["a"]]],
    ),
    "math500": (
        "test.jsonl",
        jsonl([{"problem": "a", "solution": "s", "answer": "b", "subject": "Algebra", "level": 2}]),
        [["Algebra", ["a"]]],
    ),
    "alpaca": (
        "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
        parquet([{"instruction": "a", "input": "b", "output": "c", "text": "d"}]),
        [["alpaca", ["a\n\nb"]]],
    ),
    "cnn_dm": (
        "3.0.0/test-00000-of-00001.parquet",
        parquet([{"article": "a", "highlights": "b", "id": "c"}]),
        [["cnn_dm", ["Summarise this article:\n\na"]]],
    ),
}
FETCH = """
import json, sys
from specforge.data import questions
found = [questions.load(name, 5) for name in sys.argv[1:]]
print(json.dumps([[[q.domain, [m.content for m in q.messages]] for q in one] for one in found]))
"""


def test_every_set_of_the_hub_is_fetched_with_its_licence_and_found_again_without_one(tmp_path):
    assert set(SETS) == set(questions.HUB)
    hub = Hub(repos={questions.HUB[name].repo: {SETS[name][0]: SETS[name][1]} for name in SETS})

    def fetch(url: str) -> str:
        environment = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", FETCH, *SETS],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        *said, found = done.stdout.splitlines()
        assert json.loads(found) == [SETS[name][2] for name in SETS]
        return "\n".join(said)

    with hub_server.serving(hub):
        said = fetch(hub.url)
        for name in SETS:
            assert f"{name} is {questions.HUB[name].repo}@" in said
            assert f"licence: {questions.HUB[name].licence}" in said
    assert len(hub.downloads()) == len(SETS)
    assert "in the cache" in fetch(hub.url)  # which is gone
