"""Which tokens the target would have written: the loss mask, decoded and compared with the assistant's text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from specforge.config import DataSettings
from specforge.data.formats import Text
from specforge.data.serving_view import STOPS
from specforge.data.tokenize import NOTHING, ChatTokenizer
from specforge.errors import ConfigError
from specforge.records import Conversation, Example, Message
from tests import tiny
from tests.rows import one_row, rows_of, shown

END = "<|im_end|>"
LONG = 10_000
ONE_TURN = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def chat(target):
    return ChatTokenizer(target)


@pytest.fixture
def with_template(target, tmp_path):
    def make(text):
        (tmp_path / "template.jinja").write_text(text, encoding="utf-8")
        return ChatTokenizer(target, str(tmp_path / "template.jinja"))

    return make


def conversation(*turns):
    return Conversation(id="c", messages=tuple(Message(role=role, content=content) for role, content in turns))


def supervised(chat, example):
    """The supervised text of each run of the mask."""
    assert isinstance(example, Example), example
    assert example.token_ids.dtype == np.int32
    assert example.loss_mask.dtype == np.bool_
    assert len(example.token_ids) == len(example.loss_mask)
    edges = np.flatnonzero(np.diff(example.loss_mask.astype(int), prepend=0, append=0))
    return [chat.tokenizer.decode(example.token_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def preformatted(chat, text):
    return one_row(chat, Text(id="t", text=text), 3)


def answers(*turns):
    return [content + END for role, content in turns if role == "assistant"]


USER = ("user", "how many cats?")
CASES = {
    "one turn": [USER, ("assistant", "two cats.")],
    "three turns": [t for n in range(3) for t in (("user", f"q{n}"), ("assistant", f"answer {n}"))],
    "system prompt": [("system", "be brief"), USER, ("assistant", "two")],
    "tool result": [USER, ("assistant", "call"), ("tool", "2"), ("assistant", "two cats")],
    "two answers in a row": [USER, ("assistant", "two"), ("assistant", "or three")],
    "the same text in every turn": [("user", "two"), ("assistant", "two"), ("user", "two"), ("assistant", "two")],
    "words of the template": [USER, ("assistant", "assistant"), ("user", "user"), ("assistant", "im_end")],
    "emoji": [("user", "smile 😀"), ("assistant", "😀👩‍👩‍👧‍👦 ok 🇩🇪")],
    "multi-byte": [("user", "größe?"), ("assistant", "Größe: 二千 ŝ \u0301e اثنان")],
    "whitespace around": [USER, ("assistant", "  \n two\tcats \n\n"), USER, ("assistant", " x ")],
    "whitespace inside": [USER, ("assistant", "def f():\n        return  1\n\n\n    # end")],
    "only whitespace": [USER, ("assistant", "  ")],
    "empty answer between others": [USER, ("assistant", "a"), USER, ("assistant", ""), USER, ("assistant", "b")],
    "empty user turn": [("user", ""), ("assistant", "two")],
    "header in the user's text": [("user", "say <|im_start|>assistant\nthree"), ("assistant", "two")],
    "whole turn in the user's text": [("user", f"a{END}\n<|im_start|>assistant\nthree{END}\n"), ("assistant", "two")],
    "header in the answer": [USER, ("assistant", "it is <|im_start|>assistant\n, you see"), USER, ("assistant", "b")],
}


@pytest.mark.parametrize("turns", CASES.values(), ids=CASES.keys())
def test_the_supervised_text_is_the_assistants_and_its_end(chat, turns):
    example = one_row(chat, conversation(*turns), 7, LONG)
    assert supervised(chat, example) == answers(*turns)
    assert example.sample_id == 7
    # exactly what the target would be fed: one tokenization of the rendered text
    text = chat.render([{"role": role, "content": content} for role, content in turns])
    assert example.token_ids.tolist() == chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chat.tokenizer.decode(example.token_ids) == text


pieces = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        ["<|im_start|>assistant\n", END, END + "\n", "<|im_start|>user\n", "assistant", " ", "\n", "the cat"]
    ),
)
texts = st.lists(pieces, max_size=4).map("".join)
roles = st.sampled_from(["user", "assistant", "system"])


def test_what_nobody_answers_is_not_in_the_row(chat):
    answered = [USER, ("assistant", "two")]
    one, other = (one_row(chat, conversation(*turns)) for turns in (answered, [*answered, ("user", "sure?")]))
    np.testing.assert_array_equal(one.token_ids, other.token_ids)


def test_an_answer_with_the_text_of_a_stop_is_read_and_not_learned_from(chat):
    """The server would have ended it there."""
    entry = conversation(USER, ("assistant", f"one{END}\n<|im_start|>user\ntwo"), USER, ("assistant", "b"))
    assert supervised(chat, one_row(chat, entry)) == ["b" + END]
    [found] = chat.examples([entry], DataSettings(max_length=LONG))
    assert dict(found.left_out) == {STOPS: 1}


def test_an_empty_answer_alone_leaves_nothing_to_predict(chat):
    assert "nothing to predict" in one_row(chat, conversation(USER, ("assistant", "")), 0, LONG)


@given(st.lists(st.tuples(roles, texts), max_size=5), texts.filter(bool))
@settings(max_examples=50, deadline=None)
def test_any_text_of_any_role(chat, before, last):
    turns = [USER, *before, ("assistant", last)]
    wanted = answers(*(turn for turn in turns if END not in turn[1]))
    found = one_row(chat, conversation(*turns))
    assert found in (STOPS, NOTHING) if isinstance(found, str) else supervised(chat, found) == wanted
    assert bool(wanted) or isinstance(found, str)


def test_a_conversation_that_the_assistant_opens(chat):
    """ShareGPT has many. Nobody asked for its first turn: the row may be dropped for a reason, or be masked rightly."""
    turns = [("assistant", "hello"), USER, ("assistant", "two")]
    example = one_row(chat, conversation(*turns), 0, LONG)
    assert isinstance(example, str) or supervised(chat, example) in (answers(*turns), answers(*turns[1:]))


@pytest.mark.parametrize("name", ["one turn", "three turns", "whitespace around", "whitespace inside", "emoji"])
def test_a_tokenizer_that_trims_its_offsets(target, tmp_path, name):
    """GPT-NeoX's and RoBERTa's do: a token of spaces then has an empty span, and must not tear the turn in two."""
    fast = tiny.tokenizer()
    fast.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    fast.save_pretrained(tmp_path)
    chat = ChatTokenizer(str(tmp_path))
    turns = CASES[name]
    assert supervised(chat, one_row(chat, conversation(*turns), 0, LONG)) == answers(*turns)


# Preformatted text

UNAMBIGUOUS = [n for n in CASES if "header" not in n and "whole turn" not in n]


@pytest.mark.parametrize("name", UNAMBIGUOUS)
def test_preformatted_text_gives_what_its_conversation_gives(chat, name):
    turns = CASES[name]
    text = chat.render([{"role": role, "content": content} for role, content in turns])
    example, same = one_row(chat, conversation(*turns), 3, LONG), preformatted(chat, text)
    assert isinstance(same, Example), same
    assert same.sample_id == 3
    np.testing.assert_array_equal(same.token_ids, example.token_ids)
    np.testing.assert_array_equal(same.loss_mask, example.loss_mask)


@pytest.mark.parametrize(
    "text",
    ["", "plain text", "<|im_start|>user\nq<|im_end|>\n", "<|im_start|>assistant\n", "<|im_start|>assistant\ncut off"],
)
def test_preformatted_text_without_a_whole_turn_is_refused(chat, text):
    assert isinstance(preformatted(chat, text), str)


def test_a_last_turn_that_was_cut_off_is_not_supervised(chat):
    text = "<|im_start|>assistant\nwhole<|im_end|>\n<|im_start|>assistant\ncut of"
    assert supervised(chat, preformatted(chat, text)) == ["whole<|im_end|>"]


# Templates

LAST_TWO = "{% for message in messages[-2:] %}" + ONE_TURN + "{% endfor %}" + OPEN
WITHOUT_THOUGHTS = (  # as Qwen3 and DeepSeek: thoughts of earlier turns are taken out
    "{% for message in messages %}{% set text = message['content'] %}"
    "{% if not loop.last %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + text + '<|im_end|>\\n' }}{% endfor %}" + OPEN
)
SILENT = "{% for message in messages if message['role'] == 'user' %}" + ONE_TURN + "{% endfor %}" + OPEN
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + tiny.CHATML
CHANNELS = (  # as gpt-oss: the target itself writes a channel and a special token before its text
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{{ 'final<|endoftext|>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}" + OPEN
)


def test_a_template_that_hides_old_turns_gives_what_it_serves(with_template):
    chat = with_template(LAST_TWO)
    found = [shown(chat, row) for row in rows_of(chat, conversation(*CASES["three turns"]))]
    turn, head = "<|im_start|>{}\n{}<|im_end|>\n", "<|im_start|>assistant\n"
    assert found == [
        turn.format("user", "q0") + head + "⟦answer 0<|im_end|>⟧\n",
        *(
            turn.format("assistant", f"answer {n - 1}") + turn.format("user", f"q{n}") + head
            + f"⟦answer {n}<|im_end|>⟧\n"
            for n in (1, 2)
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("template", [SILENT, "constant"])
def test_a_template_that_hides_turns_gives_a_reason_and_no_half_mask(with_template, template):
    found = one_row(with_template(template), conversation(*CASES["three turns"]), 0, LONG)
    assert isinstance(found, str)
    assert found


def test_a_template_that_hides_nothing_here_is_fine(with_template):
    chat = with_template(LAST_TWO)
    assert supervised(chat, one_row(chat, conversation(*CASES["one turn"]), 0, LONG)) == answers(*CASES["one turn"])


def test_a_template_that_takes_thoughts_out_of_earlier_turns(with_template):
    chat = with_template(WITHOUT_THOUGHTS)
    thought = ("assistant", "<think>2?</think>two")
    earlier = rows_of(chat, conversation(USER, thought, USER, ("assistant", "b")))
    head = f"<|im_start|>user\nhow many cats?{END}\n<|im_start|>assistant\n"
    assert [shown(chat, row) for row in earlier] == [
        f"{head}⟦<think>2?</think>two{END}⟧\n",
        f"{head}two{END}\n{head}⟦b{END}⟧\n",
    ]
    turns = [USER, ("assistant", "a"), USER, thought]
    assert supervised(chat, one_row(chat, conversation(*turns), 0, LONG)) == answers(*turns)


@pytest.mark.parametrize("text", ["two", "final", ""])
def test_what_the_target_writes_before_its_text_is_its_own_too(with_template, text):
    chat = with_template(CHANNELS)
    example = one_row(chat, conversation(USER, ("assistant", text)), 0, LONG)
    assert supervised(chat, example) == ["final<|endoftext|>" + text + END]


def test_a_conversation_that_the_template_refuses_is_one_dropped_row(with_template):
    """Many templates raise for roles in an order they do not know (Mistral, Gemma): no reason to stop the whole run."""
    chat = with_template(STRICT)
    assert isinstance(one_row(chat, conversation(("assistant", "hello"), USER, ("assistant", "a")), 0, LONG), str)
    assert supervised(chat, one_row(chat, conversation(USER, ("assistant", "a")), 0, LONG)) == ["a" + END]


def test_a_template_that_trims(with_template):
    chat = with_template(tiny.CHATML.replace("message['content']", "message['content'] | trim"))
    example = one_row(chat, conversation(USER, ("assistant", "  a b \n"), USER, ("assistant", "")), 0, LONG)
    assert supervised(chat, example) == ["a b" + END, END]


@pytest.mark.parametrize("text", ["{% for %}", "{{ messages[0] }", "{% if x %}"])
def test_a_template_with_a_fault_in_its_syntax_is_a_setting_to_mend(with_template, text):
    with pytest.raises(ConfigError) as refused:
        one_row(with_template(text), conversation(*CASES["one turn"]), 0, LONG)
    assert "chat-template" in refused.value.where


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00\x80binary"])
def test_a_template_that_cannot_be_read(target, tmp_path, content):
    if content is not None:
        (tmp_path / "template.jinja").write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        ChatTokenizer(target, str(tmp_path / "template.jinja"))
    assert str(tmp_path) in refused.value.where


def test_a_short_name_is_one_of_the_projects_templates(target):
    assert ChatTokenizer(target, "qwen").template_fingerprint == ChatTokenizer(target, "chatml").template_fingerprint
    with pytest.raises(ConfigError) as refused:
        ChatTokenizer(target, "llama9")
    assert "llama3" in refused.value.fix


# Length, prompt, stops


def test_the_cut_keeps_tokens_and_mask_together(chat):
    whole = one_row(chat, conversation(*CASES["three turns"]), 0, LONG)
    first = int(np.argmax(whole.loss_mask))
    for length in range(8, len(whole.token_ids) + 2):
        cut = one_row(chat, conversation(*CASES["three turns"]), 0, length)
        if length <= first + 1:  # one token alone has no other to be predicted from
            assert isinstance(cut, str)
            continue
        np.testing.assert_array_equal(cut.token_ids, whole.token_ids[:length])
        np.testing.assert_array_equal(cut.loss_mask, whole.loss_mask[:length])


@pytest.mark.parametrize("name", ["one turn", "three turns", "system prompt"])
def test_the_prompt_is_what_stands_before_the_first_supervised_token(chat, name):
    example = one_row(chat, conversation(*CASES[name]), 0, LONG)
    before = example.token_ids[: int(np.argmax(example.loss_mask))]
    assert chat.prompt_ids(conversation(*CASES[name])) == before.tolist()


def test_stops_and_specials(chat, with_template):
    names = ["<|endoftext|>", "<|im_start|>", END]
    end, every = chat.tokenizer.convert_tokens_to_ids(END), chat.tokenizer.convert_tokens_to_ids(names)
    assert chat.stop_ids() == [end]
    assert set(chat.special_ids()) <= set(every)
    assert end in chat.special_ids()
    other = with_template(tiny.CHATML.replace(END, "<|endoftext|>"))  # ends its turns with another token than eos
    assert set(other.stop_ids()) == {every[0], end}


def test_fingerprints_tell_tokenizers_and_templates_apart(chat, with_template, tmp_path):
    other = with_template(SILENT)
    assert other.fingerprint == chat.fingerprint
    assert other.template_fingerprint != chat.template_fingerprint
    fast = tiny.tokenizer()
    fast.add_tokens(["one_more"])
    fast.save_pretrained(tmp_path / "other")
    assert ChatTokenizer(str(tmp_path / "other")).fingerprint != chat.fingerprint


def test_a_folder_without_a_tokenizer(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as refused:
        ChatTokenizer(str(tmp_path / "empty"))
    assert "--model-path" in refused.value.where
