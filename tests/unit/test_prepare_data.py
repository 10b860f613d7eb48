"""`specforge prepare-data` as a whole, in process: rows of many kinds to two files and a report."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections import Counter

import pytest
from transformers import AutoTokenizer

from specforge.config import PrepareDataSettings
from specforge.data import preparation
from specforge.errors import ConfigError, DataError
from specforge.pipeline.data import prepare_data
from tests import tiny

TURNS = [{"role": "user", "content": "how many cats?"}, {"role": "assistant", "content": "two cats."}]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prepare(tmp_path, target):
    def run(*dataset, output="out", **settings):
        given = {"model_path": target, "max_length": 512, "test_share": 0.2} | settings
        prepare_data(PrepareDataSettings(dataset=tuple(map(str, dataset)), output=tmp_path / output, **given))
        return json.loads((tmp_path / output / "report.json").read_text())

    return run


def rows_of(folder, side="train"):
    return [json.loads(line) for line in (folder / f"{side}.jsonl").read_text().splitlines()]


def spoken(row, target):
    """The supervised text of a prepared row."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    return tokenizer.decode([t for t, on in zip(row["input_ids"], row["loss_mask"], strict=True) if on])


KINDS = {  # one format each: the same conversation
    "conversations (role/content)": {"conversations": TURNS},
    "messages (role/content)": {"messages": TURNS, "prompt": "how many cats?", "prompt_id": "x"},  # as in UltraChat
    "conversations (from/value)": {
        "conversations": [{"from": "human", "value": "how many cats?"}, {"from": "gpt", "value": "two cats."}]
    },
    "prompt/response (role/content)": {"prompt": "how many cats?", "response": "two cats."},
    "prompt/completion (role/content)": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "instruction/output (role/content)": {"instruction": "how many", "input": "cats?", "output": "two cats."},
    "question/answer (role/content)": {"question": "how many cats?", "answer": "two cats."},
    "messages with parts": {
        "messages": [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_supervised_text(prepare, tmp_path, target, kind):
    others = tiny.conversations(30)
    report = prepare(tiny.write_jsonl(tmp_path / "rows.jsonl", [KINDS[kind] | {"id": "mine"}, *others]))
    [mine] = [row for side in ("train", "test") for row in rows_of(tmp_path / "out", side) if row["id"] == "mine"]
    assert spoken(mine, target) == "two cats.<|im_end|>"
    assert kind in report["formats"] or kind == "messages with parts"
    assert sum(report["formats"].values()) == 31


def test_tool_calls_and_reasoning_reach_the_template(prepare, tmp_path, target):
    call = {"function": {"name": "count", "arguments": '{"animal": "cat"}'}}  # arguments as a string, as APIs give them
    turns = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "name": "count"},
        {"role": "assistant", "content": "two.", "reasoning_content": "2 is two"},
    ]
    rows = [{"id": "mine", "messages": turns}, *tiny.conversations(30)]
    prepare(tiny.write_jsonl(tmp_path / "rows.jsonl", rows), chat_template="qwen3")
    mine = [row for side in ("train", "test") for row in rows_of(tmp_path / "out", side) if "mine" in row["id"]]
    # the call has no thought, so thinking was off: the empty thought stands in its prompt, and in no later one
    assert [(row["id"], spoken(row, target)) for row in mine] == [
        ("mine", '<tool_call>\n{"name": "count", "arguments": {"animal": "cat"}}\n</tool_call><|im_end|>'),
        ("mine#2", "<think>\n2 is two\n</think>\n\ntwo.<|im_end|>"),
    ]


BAD = {
    "a turn of unknown role 'robot'": {"messages": [{"role": "robot", "content": "x"}, TURNS[1]]},
    "both 'conversations' and 'messages'": {"conversations": TURNS, "messages": TURNS},
    "'messages' is no list of turns": {"messages": []},
    "a turn that is not only text": {"messages": [{"role": "user", "content": [{"type": "text"}]}, TURNS[1]]},
    "parts other than text (images and the like are not supported)": {
        "messages": [{"role": "user", "content": [{"type": "image"}]}, TURNS[1]]
    },
    "text that is already formatted (give --is-preformatted)": {"text": "<|im_start|>user\nx<|im_end|>\n"},
    "no known format: columns a, b": {"a": 1, "b": 2},
    "tool calls without a function's name and arguments": {"messages": [TURNS[0], TURNS[1] | {"tool_calls": [{}]}]},
    "no assistant turn": {"messages": TURNS[:1]},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_row_that_cannot_be_used_is_counted_with_its_line(prepare, tmp_path, reason):
    rows = tiny.conversations(150)
    rows.insert(6, BAD[reason])
    report = prepare(tiny.write_jsonl(tmp_path / "rows.jsonl", rows))
    assert report["dropped"].get(reason) == 1
    assert report["dropped_at"][reason] == ["rows.jsonl:7"]
    assert report["kept"] + sum(report["dropped"].values()) == 151


def test_too_many_rows_in_no_known_format_stop_it_and_leave_nothing(prepare, tmp_path):
    rows = [*tiny.conversations(97), *({"a": 1} for _ in range(3))]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as refused:
        prepare(path)
    assert "3 of 100" in refused.value.what
    assert "rows.jsonl:98" in refused.value.where
    assert not list((tmp_path / "out").glob("*"))
    assert prepare(path, max_bad_rows=0.05)["dropped"] == {"no known format: columns a": 3}


def test_the_number_of_workers_changes_nothing(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "WORTH_A_WORKER", 100)
    monkeypatch.setattr(preparation, "CHUNK_ROWS", 16)
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(300))
    one = prepare(path, output="one", workers=1)
    two = prepare(path, output="two", workers=2)
    assert one["files"] == two["files"]
    for side in ("train", "test"):
        assert (tmp_path / "one" / f"{side}.jsonl").read_bytes() == (tmp_path / "two" / f"{side}.jsonl").read_bytes()
    one.pop("made_from"), two.pop("made_from")
    assert one == two


def test_the_same_rows_and_settings_are_not_prepared_twice(prepare, tmp_path, capsys):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(60))
    prepare(path)
    first = (tmp_path / "out" / "train.jsonl").stat().st_mtime_ns

    def made_again(**settings):
        nonlocal first
        prepare(path, **settings)
        before, first = first, (tmp_path / "out" / "train.jsonl").stat().st_mtime_ns
        return first != before

    assert not made_again()
    assert made_again(seed=5)
    assert made_again()
    tiny.write_jsonl(path, tiny.conversations(61))
    assert made_again()
    (tmp_path / "out" / "test.jsonl").write_text("{}\n")  # not what the report tells of
    assert made_again()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    del report["made_from"]["rules"]  # as before there was the serving view
    (tmp_path / "out" / "report.json").write_text(json.dumps(report))
    assert made_again()


def test_several_sources_are_weighted_and_mixed(prepare, tmp_path):
    one = tiny.write_jsonl(tmp_path / "one.jsonl", tiny.conversations(400, seed=1))
    two = tiny.write_jsonl(tmp_path / "two.jsonl", tiny.conversations(400, seed=2))
    report = prepare(one, f"{two}=0.25")
    rows = rows_of(tmp_path / "out")
    counted = Counter(row["source"] for row in rows + rows_of(tmp_path / "out", "test"))
    assert 60 < counted[str(two)] < 140  # 100 expected, standard deviation 9
    assert counted[str(one)] > 380
    assert report["dropped"][f"left out by the weight of {two}"] + counted[str(two)] == 400
    places = [at for at, row in enumerate(rows) if row["source"] == str(two)]
    assert min(places) < len(rows) / 10  # not one behind the other
    assert set(report["draft_vocabulary"]["coverage_by_source"]) == {str(one), str(two)}


def test_a_domain_is_carried_and_without_one_nothing_changes(prepare, tmp_path):
    bare = tiny.conversations(60)
    named = [row | ({"domain": ("code", "chat")[at % 2]} if at < 40 else {}) for at, row in enumerate(bare)]
    domain_of = {row["id"]: row.get("domain") for row in named}
    for output, given in (("tokens", {}), ("turns", {"model_path": None})):
        prepare(tiny.write_jsonl(tmp_path / "rows.jsonl", named), output=output, **given)
        rows = rows_of(tmp_path / output) + rows_of(tmp_path / output, "test")
        assert {row.get("domain") for row in rows} == {"code", "chat", None}
        assert all(row.get("domain") == domain_of[row["id"]] for row in rows)
        prepare(tiny.write_jsonl(tmp_path / "rows.jsonl", bare), output=output + "-bare", **given)
        for side in ("train", "test"):
            without = [{k: v for k, v in row.items() if k != "domain"} for row in rows_of(tmp_path / output, side)]
            assert without == rows_of(tmp_path / f"{output}-bare", side)


def test_fewest_exchanges(prepare, tmp_path):
    rows = [*tiny.conversations(40, turns=1), *tiny.conversations(40, seed=3, turns=2)]
    report = prepare(tiny.write_jsonl(tmp_path / "rows.jsonl", rows), min_exchanges=2)
    assert report["dropped"]["fewer than 2 exchanges"] == 40


@pytest.mark.parametrize("overlong", ["truncate-turn", "truncate", "drop"])
def test_overlong_conversations(prepare, tmp_path, target, overlong):
    source = random.Random(0)
    turns = [{"role": role, "content": tiny.sentence(source, 12)} for _ in range(6) for role in ("user", "assistant")]
    rows = [{"id": "long", "conversations": turns}, *tiny.conversations(30)]
    report = prepare(tiny.write_jsonl(tmp_path / "rows.jsonl", rows), max_length=150, overlong=overlong)
    found = [row for side in ("train", "test") for row in rows_of(tmp_path / "out", side) if row["id"] == "long"]
    if overlong == "drop":
        assert not found
        assert report["dropped"]["longer than the maximum length"] == 1
        return
    [long] = found
    told = spoken(long, target)
    answers = "".join(turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant")
    assert answers.startswith(told)
    if overlong == "truncate":
        assert len(long["input_ids"]) == 150
    else:
        assert told.endswith("<|im_end|>")
        assert 50 < len(long["input_ids"]) <= 150


def test_what_a_killed_run_left_is_cleared(prepare, tmp_path):
    stale = tmp_path / "out" / ".prepare-xyz"
    stale.mkdir(parents=True)
    (stale / "spool.jsonl").write_text("x")
    prepare(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(30)))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "test.jsonl", "train.jsonl"]


# Seeing it


def show(tmp_path, target, capsys, **settings):
    rows = [{"id": "emoji", "messages": [TURNS[0], {"role": "assistant", "content": "zwei 👩‍👩‍👧 <b>"}]}]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [*rows, *tiny.conversations(5)])
    settings = {"dataset": (str(path),), "model_path": target, "output": tmp_path / "out", "show_mask": 2} | settings
    prepare_data(PrepareDataSettings(**settings))
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().out


def test_the_mask_is_shown_and_nothing_is_written(tmp_path, target, capsys):
    said = show(tmp_path, target, capsys)
    assert "<|im_start|>assistant↵\n⟦zwei 👩‍👩‍👧 <b><|im_end|>⟧↵" in said
    assert said.count("⟦") == 3  # one turn, and two of the second row


def test_the_page_in_a_browser(tmp_path, target, capsys):
    """The page as Chromium reads it: the supervised tokens, by their class, are the assistant's text."""
    show(tmp_path, target, capsys, html=tmp_path / "mask.html")
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no Chromium on the PATH to read the page with")
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    url = f"file://{tmp_path / 'mask.html'}"
    given = [browser, *flags.split(), profile, "--enable-logging=stderr", "--dump-dom", url]
    done = subprocess.run(given, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    row = done.stdout.split('<div class="row">')[1].split("</div>")[0]
    tokens = [piece.split(">", 1)[1].removesuffix("</span>") for piece in row.split('<span class="on')[1:]]
    assert "".join(token.split("</span>")[0] for token in tokens) == "zwei 👩‍👩‍👧 &lt;b&gt;&lt;|im_end|&gt;"


def test_showing_needs_a_target_and_a_number(tmp_path, target):
    with pytest.raises(ConfigError):
        prepare_data(PrepareDataSettings(dataset=("x",), show_mask=1))
    with pytest.raises(ConfigError):
        prepare_data(PrepareDataSettings(dataset=("x",), model_path=target, html=tmp_path / "x.html"))
