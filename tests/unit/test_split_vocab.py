"""Duplicates, the split by prompt without leaks, and the draft vocabulary."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge.data import vocab
from specforge.data.formats import Text, Tokens, parse
from specforge.data.split import HeldOutIndex, content_hash, held_out, prompt_hash, prompt_key, shingles
from specforge.records import Conversation, Message

WORDS = [f"word{n}" for n in range(500)]
checked = settings(max_examples=50, deadline=None)


def conversation(*contents, id="c", first="user"):
    roles = [first, "assistant"] if first == "user" else [first, "user", "assistant"]
    return Conversation(
        id=id, messages=tuple(Message(role=roles[at % len(roles)], content=text) for at, text in enumerate(contents))
    )


def text(source, length):
    return " ".join(source.choice(WORDS) for _ in range(length))


def corpus(count, seed=0, prompts=None):
    source = random.Random(seed)
    prompts = prompts or [text(source, 12) for _ in range(count)]
    return [conversation(source.choice(prompts), text(source, 30), id=str(n)) for n in range(count)]


def split(rows, share, seed):
    test_n = held_out(np.array([prompt_hash(row, seed) for row in rows], dtype=np.uint64), share)
    sides = ([row for row, side in zip(rows, test_n, strict=True) if side == wanted] for wanted in (False, True))
    return tuple(sides)


def without_leaks(train, test):
    index = HeldOutIndex.of(shingles(row) for row in test)
    return [row for row in train if not index.leaks(shingles(row))]


# Duplicates


def test_exact_duplicates_go_and_the_first_of_each_stays_in_order():
    rows = [
        conversation("a", "b", id="1"),
        conversation("a", "c", id="2"),
        conversation("a", "b", id="3"),  # of 1
        conversation("a ", "\nb", id="4"),  # of 1: space around a turn is nothing
        conversation("A", "b", id="5"),
        conversation("a", "b", "", id="6"),
        conversation("ab", "", id="7"),
        conversation("", "ab", id="8"),
        conversation("a", "b", id="9", first="system"),
    ]
    seen = {}
    for row in rows:
        seen.setdefault(content_hash(row), row.id)
    assert list(seen.values()) == ["1", "2", "5", "6", "7", "8", "9"]


def test_the_same_turns_with_other_tools_or_arguments_are_other_rows():
    turns = [{"role": "user", "content": "Play"}, {"role": "assistant", "content": "I cannot."}]
    tools = [[{"type": "function", "function": {"name": name}}] for name in ("weather", "move")]
    more = [{}, *({"tools": given} for given in tools), {"chat_template_kwargs": {"enable_thinking": False}}]
    hashes = [content_hash(parse({"messages": turns, **extra}, "x")[1]) for extra in more]
    assert len(set(hashes)) == 4
    assert content_hash(parse({"messages": turns, **more[1]}, "y")[1]) == hashes[1]
    stamped = [turn | {"timestamp": at} for at, turn in enumerate(turns)]
    assert content_hash(parse({"messages": stamped}, "x")[1]) == hashes[0]
    called = [turns[0], turns[1] | {"function_calls": "play()"}]
    assert content_hash(parse({"messages": called}, "x")[1]) != hashes[0]


CHINESE = "请告诉我城里有哪些值得参观的名胜古迹"
JAPANESE = "町で見る価値のある場所を教えてください"
THAI = "ช่วยบอกสถานที่ที่ควรไป"


@pytest.mark.parametrize("text", ["Tell me which sights of the town are worth a visit, try ", CHINESE, JAPANESE, THAI])
def test_near_duplicates_are_found_in_scripts_without_spaces(text):
    one, two = (shingles(conversation(text + end, text[::-1] + end)) for end in ("1", "2"))
    other = shingles(conversation(text[::-1], "2"))
    index = HeldOutIndex.of([one])
    assert index.leaks(two)
    assert not HeldOutIndex.of([shingles(conversation("quite another thing", "yes, one"))]).leaks(other)


def test_rows_of_tokens_and_of_formatted_text_are_told_apart_by_all_that_they_hold():
    ids, mask = np.array([1, 2, 3], dtype=np.int32), np.array([False, True, True])
    tokens = Tokens(id="t", token_ids=ids, loss_mask=mask)
    assert content_hash(tokens) == content_hash(Tokens(id="u", token_ids=ids.copy(), loss_mask=mask.copy()))
    assert content_hash(tokens) != content_hash(Tokens(id="t", token_ids=ids, loss_mask=~mask))
    assert prompt_key(tokens) == "1"
    assert content_hash(Text(id="a", text="x\n")) == content_hash(Text(id="b", text="x"))
    assert prompt_key(Text(id="a", text="Say: hi!")) == "say hi"


# Split


@given(st.integers(0, 5), st.floats(0.1, 0.5), st.integers(0, 3))
@checked
def test_no_prompt_is_on_both_sides_and_no_row_is_lost(data_seed, share, seed):
    source = random.Random(data_seed)
    prompts = [text(source, 6) for _ in range(20)]
    rows = corpus(60, data_seed, [*prompts, *(p.upper() + "?!" for p in prompts)])
    train, test = split(rows, share, seed)
    assert {prompt_key(row) for row in train}.isdisjoint(prompt_key(row) for row in test)
    assert sorted(int(row.id) for row in train + test) == list(range(60))
    for side in (train, test):  # in the order of the file
        assert [int(row.id) for row in side] == sorted(int(row.id) for row in side)
    assert len({prompt_key(row) for row in rows}) <= 20  # case and punctuation make no other prompt


def test_a_rows_side_does_not_depend_on_the_other_rows():
    rows = corpus(400)
    test = {row.id for row in split(rows, 0.2, 1)[1]}
    added = [conversation(f"another prompt {n}", "a", id=f"x{n}") for n in range(100)]
    mixed = [*added, *rows]
    random.Random(5).shuffle(mixed)
    assert {row.id for row in split(mixed, 0.2, 1)[1]} - {row.id for row in added} == test
    half = rows[:200]
    assert {row.id for row in split(half, 0.2, 1)[1]} == test & {row.id for row in half}


def test_the_share_and_the_seed_are_heeded():
    rows = [conversation(f"prompt number {n}", "a", id=str(n)) for n in range(4000)]
    sides = {seed: {row.id for row in split(rows, 0.1, seed)[1]} for seed in (0, 1)}
    for test in sides.values():
        assert 320 < len(test) < 480
    assert len(sides[0] & sides[1]) < 100


@pytest.mark.parametrize(("count", "share"), [(2, 0.01), (3, 0.05), (2, 0.9), (3, 0.99)])
def test_with_few_rows_both_sides_still_have_one(count, share):
    rows = [conversation(f"prompt {n}", "a", id=str(n)) for n in range(count)]
    for seed in range(8):
        train, test = split(rows, share, seed)
        assert train, f"seed {seed}"
        assert test, f"seed {seed}"
        assert {row.id for row in train + test} == {row.id for row in rows}


def test_a_prompt_is_never_torn_apart_to_fill_a_side():
    rows = [conversation("one prompt", text(random.Random(n), 5), id=str(n)) for n in range(10)]
    train, test = split(rows, 0.05, 0)
    assert not train or not test


# Leaks


def altered(row, source, share):
    """The same conversation with a share of its words replaced."""
    words = [[w if source.random() > share else "other" for w in m.content.split()] for m in row.messages]
    return conversation(*(" ".join(w) for w in words), id="leak")


def test_near_duplicates_of_held_out_rows_leave_the_training_rows():
    source = random.Random(1)
    train, test = corpus(200, 2), corpus(40, 3)
    leaks = [
        *test[:5],
        *(altered(row, source, 0.05) for row in test[5:10]),
        conversation(*(m.content.upper() + " !" for m in test[10].messages)),
        conversation(*(m.content for m in test[11].messages[::-1])),  # the answer asked, the question answered
        conversation(test[12].messages[0].content, test[12].messages[1].content, "thanks", "you are welcome"),
        conversation(test[13].messages[0].content, test[13].messages[1].content[:150]),
        conversation(
            *(m.content for m in (Message(role="system", content="be kind"), *test[14].messages)), first="system"
        ),
    ]
    mixed = [*train, *leaks]
    source.shuffle(mixed)
    kept = without_leaks(mixed, test)
    assert [row for row in mixed if row in train] == kept


def test_what_only_shares_phrases_stays():
    source = random.Random(1)
    test = [conversation("please tell me in one sentence " + text(source, 10), text(source, 30)) for _ in range(50)]
    train = [conversation("please tell me in one sentence " + text(source, 10), text(source, 30)) for _ in range(50)]
    assert without_leaks(train, test) == train
    assert without_leaks(train, []) == train


def test_the_index_is_the_same_from_disk(tmp_path):
    test = corpus(40, 3)
    index = HeldOutIndex.of(shingles(row) for row in test)
    index.save(tmp_path)
    loaded = HeldOutIndex.load(tmp_path)
    for row in [*corpus(20, 2), *test]:
        assert index.leaks(shingles(row)) == loaded.leaks(shingles(row)) == (row in test)


# Vocabulary

counts_of = st.lists(st.integers(0, 5), min_size=1, max_size=40).map(lambda found: np.array(found, dtype=np.int64))


@given(counts_of, st.integers(1, 50), st.data())
@checked
def test_the_vocabulary_is_ascending_holds_the_specials_and_is_the_best_that_fits(counts, size, data):
    always = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=min(size, len(counts)), unique=True))
    before = counts.copy()
    kept = vocab.choose(counts, size, always)
    assert len(kept) == min(size, len(counts))
    assert np.all(np.diff(kept) > 0)
    assert kept.min() >= 0
    assert kept.max() < len(counts)
    assert set(always) <= set(kept.tolist())
    # beside the specials: nobody left out is more frequent, or equally frequent and lower
    chosen = [(-counts[i], i) for i in kept if i not in always]
    left = [(-counts[i], i) for i in range(len(counts)) if i not in set(kept.tolist())]
    assert not chosen or not left or max(chosen) < min(left)
    np.testing.assert_array_equal(counts, before)


def test_the_lowest_ids_fill_up_where_too_few_tokens_were_seen():
    counts = np.zeros(100, dtype=np.int64)
    counts[[50, 70]] = [3, 9]
    assert vocab.choose(counts, 6, [99]).tolist() == [0, 1, 2, 50, 70, 99]
    assert vocab.choose(counts, 2, []).tolist() == [50, 70]
    assert vocab.choose(counts, 1, []).tolist() == [70]
    assert vocab.choose(counts, 1000, [99]).tolist() == list(range(100))


def test_only_supervised_tokens_count():
    rows = [
        (np.array([1, 2, 2, 3], dtype=np.int32), np.array([False, True, True, False])),
        (np.array([2, 5], dtype=np.int32), np.array([True, True])),
        (np.array([4], dtype=np.int32), np.array([False])),
    ]
    counts = vocab.count_supervised(rows, 7)
    assert counts.tolist() == [0, 0, 3, 0, 0, 1, 0]
    assert vocab.coverage(counts, np.array([2])) == 0.75
    assert vocab.coverage(counts, np.array([2, 5])) == 1.0
    assert vocab.coverage(counts, np.array([0, 1])) == 0.0
    assert vocab.coverage(np.zeros(7, dtype=np.int64), np.array([0])) == 0.0
