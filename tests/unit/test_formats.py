"""Reading JSONL: each broken row is counted where it is, and costs nothing but itself."""

from __future__ import annotations

import json

import numpy as np
import pytest

from specforge.config import DataSettings
from specforge.data.formats import ReadReport, read_conversations, read_rows, to_conversation, to_row
from specforge.data.prepared import data_hash, load_examples, load_held_out, load_splits
from specforge.data.tokenize import ChatTokenizer
from specforge.errors import DataError
from tests import tiny
from tests.rows import one_row


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return ChatTokenizer(str(folder))


def lines(count=1000):
    return [json.dumps(row).encode() for row in tiny.conversations(count)]


def write(path, rows):
    path.write_bytes(b"".join(row + b"\n" for row in rows))
    return path


BROKEN = [b"{", b"not json", b"[1, 2]", b"null", b'"text"', b'{"conversations": "\xff\xfe"}', b"\x00\x01\x02", b"{} {}"]


@pytest.mark.parametrize("bad", BROKEN)
def test_a_broken_line_costs_one_row_and_is_named(tmp_path, bad):
    rows = lines()
    rows[500] = bad
    report = ReadReport()
    found = list(read_rows(write(tmp_path / "rows.jsonl", rows), report))
    assert [row["id"] for _, row in found] == [f"row-{n}" for n in range(1000) if n != 500]
    [[reason, rows]] = report.dropped.items()
    assert (reason.split(":")[0], rows, report.bad) == ("broken line", 1, 1)
    assert report.where[reason] == ["rows.jsonl:501"]
    assert report.rows == 1000


def test_one_percent_is_the_bound(tmp_path):
    for broken, accepted in ((10, True), (11, False)):
        rows = lines()
        for at in range(broken):
            rows[at * 90 + 7] = b"{broken"
        report = ReadReport()
        reading = read_rows(write(tmp_path / f"{broken}.jsonl", rows), report)
        if accepted:
            assert len(list(reading)) == 1000 - broken
            continue
        with pytest.raises(DataError) as refused:
            list(reading)
        assert "11 of 1,000" in refused.value.what
        assert f"{tmp_path}/11.jsonl, first at 11.jsonl:8, 11.jsonl:98, 11.jsonl:188" in refused.value.where


def test_empty_lines_are_nothing_and_the_last_line_may_lack_its_end(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\n\n" + b"\r\n  \n".join(lines(3)))
    report = ReadReport()
    assert len(list(read_rows(tmp_path / "rows.jsonl", report))) == 3
    assert report.rows == 3


def test_characters_that_end_a_line_elsewhere_do_not_end_one_here(tmp_path):
    """U+2028 and U+0085 stand in JSON strings as they are."""
    row = {"id": "a\u2028b\u0085c\x0bd", "conversations": []}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(read_rows(tmp_path / "rows.jsonl", ReadReport())) == [(1, row)]


RULES = DataSettings(max_length=512)
GOOD = {"role": "assistant", "content": "two"}


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"conversations": None},
        {"conversations": []},
        {"conversations": {"role": "assistant", "content": "a"}},
        {"conversations": "text"},
        {"conversations": ["text", GOOD]},
        {"conversations": [None, GOOD]},
        {"conversations": [{"role": "assistant"}]},
        {"conversations": [{"content": "a"}, GOOD]},
        {"conversations": [{"role": "assistant", "content": None}]},
        {"conversations": [{"role": "assistant", "content": 3}]},
        {"conversations": [{"role": "assistant", "content": ["a"]}]},
        {"conversations": [{"role": "robot", "content": "a"}, GOOD]},
        {"conversations": [{"role": ["assistant"], "content": "a"}, GOOD]},
        {"conversations": [{"role": {}, "content": "a"}, GOOD]},
        {"conversations": [{"role": "user", "content": "a"}]},
        {"conversations": [{"role": "user", "content": "half a pair \ud83d"}, GOOD]},
    ],
)
def test_a_row_that_is_no_conversation_gives_a_reason(tmp_path, chat, row):
    """As a row by itself, and inside a file, where it costs nothing but itself."""
    if "\\ud" not in json.dumps(row):
        assert isinstance(to_conversation(row, "1"), str)
    rows = [*lines(120), json.dumps(row).encode()]
    report = ReadReport()
    kept = read_conversations(write(tmp_path / "rows.jsonl", rows), report)
    for conversation in kept:  # what is kept can be written and hashed
        json.dumps(to_row(conversation), ensure_ascii=False).encode()
    assert len(kept) == 120
    assert sum(report.dropped.values()) == 1
    assert len(load_examples(tmp_path / "rows.jsonl", chat, RULES)) == 120


def test_a_conversation_and_its_row_are_the_same():
    for row in tiny.conversations(5):
        conversation = to_conversation(row, "other")
        assert to_row(conversation) == row
        assert to_conversation(to_row(conversation), "") == conversation


def test_a_domain_is_kept_with_the_row_and_is_a_short_name(tmp_path, chat):
    [row] = tiny.conversations(1)
    conversation = to_conversation(row | {"domain": " code "}, "")
    assert conversation.domain == "code"
    assert to_row(conversation) == row | {"domain": "code"}
    assert to_conversation(row | {"domain": "x" * 1000}, "").domain == "x" * 64
    for none in (None, "", 7, ["code"]):
        assert to_row(to_conversation(row | {"domain": none}, "")) == row
    example = one_row(chat, to_conversation(row, ""), 0, 512)
    tokens = {"input_ids": example.token_ids.tolist(), "loss_mask": example.loss_mask.astype(int).tolist()}
    rows = [row, row | {"source": "s"}, row | {"source": "s", "domain": "code"}, tokens | {"domain": "code"}]
    found = load_examples(tiny.write_jsonl(tmp_path / "rows.jsonl", rows), chat, RULES)
    assert [other.domain for other in found] == ["", "s", "code", "code"]
    bare = load_examples(tiny.write_jsonl(tmp_path / "bare.jsonl", [row] * 4), chat, RULES)
    assert data_hash(bare) == data_hash(found)


def test_a_file_without_any_assistant_turn_names_what_was_found(tmp_path):
    rows = [json.dumps({"conversations": [{"role": "user", "content": "a"}]}).encode()] * 3
    with pytest.raises(DataError) as refused:
        read_conversations(write(tmp_path / "rows.jsonl", rows), ReadReport())
    assert "'no assistant turn': 3" in refused.value.what


# Rows of tokens


def token_row(**other):
    return {"id": "t", "input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]} | other


@pytest.mark.parametrize(
    "row",
    [
        token_row(input_ids=[]),
        token_row(input_ids=[], loss_mask=[]),
        token_row(loss_mask=[1, 1, 1]),
        token_row(loss_mask=None),
        {"input_ids": [1, 2]},
        token_row(input_ids=[5, 6, 7, 10_000]),
        token_row(input_ids=[5, 6, 7, -1]),
        token_row(input_ids=["5", "6", "7", "8"]),
        token_row(input_ids=[5, 6, None, 8]),
        token_row(input_ids=[5, 6, 7.5, 8]),
        token_row(input_ids=[[5], [6], [7], [8]]),
        token_row(input_ids=5),
        token_row(input_ids="5678"),
        token_row(loss_mask=["0", "0", "1", "1"]),
        token_row(loss_mask=[0, 0, [1], 1]),
    ],
)
def test_a_row_of_tokens_that_is_none_is_dropped(tmp_path, chat, row):
    path = write(tmp_path / "rows.jsonl", [json.dumps(token_row()).encode(), json.dumps(row).encode()])
    examples = load_examples(path, chat, RULES)
    assert [example.token_ids.tolist() for example in examples] == [[5, 6, 7, 8]]
    assert examples[0].loss_mask.tolist() == [False, False, True, True]


def test_the_three_kinds_of_rows_give_the_same_example(tmp_path, chat):
    [row] = tiny.conversations(1)
    example = one_row(chat, to_conversation(row, ""), 0, 512)
    tokens = {"input_ids": example.token_ids.tolist(), "loss_mask": example.loss_mask.astype(int).tolist()}
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [row, tokens])
    found = load_examples(path, chat, RULES)
    assert [other.sample_id for other in found] == [0, 1]
    texts = tiny.write_jsonl(tmp_path / "texts.jsonl", [{"text": chat.render(row["conversations"])}])
    found += load_examples(texts, chat, DataSettings(max_length=512, is_preformatted=True))
    for other in found:
        np.testing.assert_array_equal(other.token_ids, example.token_ids)
        np.testing.assert_array_equal(other.loss_mask, example.loss_mask)


def test_a_single_file_holds_every_twentieth_out(tmp_path, chat):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(45))
    whole, splits = load_examples(path, chat, RULES), load_splits(path, chat, RULES)
    assert data_hash(splits["test"]) == data_hash([whole[19], whole[39]])
    assert data_hash(splits["train"]) == data_hash([e for at, e in enumerate(whole) if at not in (19, 39)])


def test_the_held_out_side_is_that_of_both(tmp_path, chat):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(45))
    tiny.write_jsonl(tmp_path / "test.jsonl", tiny.conversations(7))  # and no train.jsonl: it is not read
    assert data_hash(load_held_out(path, chat, RULES)) == data_hash(load_splits(path, chat, RULES)["test"])
    assert len(load_held_out(tmp_path, chat, RULES)) == 7


def test_samples_of_a_split_are_numbered_each_once(tmp_path, chat):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(45))
    for examples in load_splits(path, chat, RULES).values():
        ids = [example.sample_id for example in examples]
        assert ids == sorted(set(ids))


def test_the_data_hash_sees_order_tokens_masks_and_edges(tmp_path, chat):
    examples = load_examples(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(4)), chat, RULES)
    first = data_hash(examples)
    assert data_hash(examples) == first
    assert data_hash(examples[::-1]) != first
    assert data_hash(examples[:3]) != first
    rules = DataSettings(max_length=len(examples[0].token_ids) - 1, overlong="truncate")
    shorter = load_examples(tmp_path / "rows.jsonl", chat, rules)
    assert data_hash(shorter) != first
    examples[0].loss_mask[0] = ~examples[0].loss_mask[0]
    assert data_hash(examples) != first
