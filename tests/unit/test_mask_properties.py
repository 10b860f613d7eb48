"""Random conversations through each template family: what is supervised is what the assistant said, nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specforge.data.serving_view import STOPS as STOPPED
from specforge.data.tokenize import NOTHING, ChatTokenizer
from specforge.records import Conversation, Message
from tests import tiny
from tests.rows import rows_of
from tests.unit.test_golden_masks import FAMILIES, chat_of

END = {
    "chatml": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "gpt-oss": "<|return|>",
}
STOPS = {family: {end} for family, end in END.items()} | {
    "phi3": {"<|end|>", "<|endoftext|>"},
    "gpt-oss": {"<|return|>", "<|call|>"},
}
BEFORE = {"gpt-oss": "<|channel|>final<|message|>"}
TRIMS = {"llama3", "gemma"}
MARKERS = [token for special, _ in FAMILIES.values() for token in special if "think" not in token]
texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.sampled_from([*MARKERS, "<|im_start|>assistant\n", "<|im_end|>", " ", "the cat", "👩‍👩‍👧", "\n\n"]),
    ),
    max_size=4,
).map("".join)
exchanges = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return {family: chat_of(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def supervised(chat, masked):
    """The supervised text of each turn: runs of the mask."""
    ids_T, mask_T = masked
    edges = np.flatnonzero(np.diff(mask_T.astype(int), prepend=0, append=0))
    return [chat.tokenizer.decode(ids_T[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@given(exchanges, st.one_of(st.none(), texts))
@settings(max_examples=60, deadline=None)
def test_the_supervised_text_is_what_the_assistant_said(chats, family, found, system):
    chat = chats[family]
    messages = [Message(role="system", content=system)] if system else []
    for asked, answered in found:
        messages += [Message(role="user", content=asked), Message(role="assistant", content=answered)]
    rows = rows_of(chat, Conversation(id="c", messages=tuple(messages)))
    # a stop inside an answer would have ended it; an empty answer alone in its row leaves nothing to predict
    answers = [
        text.strip() if family in TRIMS else text for _, text in found if not any(s in text for s in STOPS[family])
    ]
    if isinstance(rows, str):
        assert rows in (STOPPED, NOTHING)
        assert not any(text.strip() for text in answers)
        return
    told = [text for masked in rows for text in supervised(chat, masked)]
    if len(told) != len(answers):
        assert family in ("qwen3", "mistral")  # whose turns become rows of their own
        answers = [text for text in answers if text.strip("\n")]
        told = [text for text in told if text.removesuffix(END[family]).strip("\n")]
    assert len(told) == len(answers)
    for text, answer in zip(told, answers, strict=True):
        assert text in [BEFORE.get(family, "") + shown + END[family] for shown in (answer, answer.lstrip("\n"))]


GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + INSIDE }}{% endgeneration %}"
    "{{ OUTSIDE }}{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize(("inside", "outside"), [("<|im_end|>", "\\n"), ("<|im_end|>\\n", ""), ("", "<|im_end|>\\n")])
@given(exchanges)
@example([("", "<|im_end|>")])
@settings(max_examples=60, deadline=None)
def test_generation_blocks_change_nothing(tmp_path_factory, inside, outside, found):
    """Whether the block holds the end of the turn, the line end behind it, or neither."""
    folder = tmp_path_factory.mktemp("stated")
    template = GENERATION.replace("INSIDE", f"'{inside}'").replace("OUTSIDE", f"'{outside}'")
    tiny.tokenizer(chat_template=template).save_pretrained(folder)
    stated = ChatTokenizer(str(folder))
    (folder / "plain.jinja").write_text(tiny.CHATML)
    plain = ChatTokenizer(str(folder), str(folder / "plain.jinja"))
    messages = [
        Message(role=role, content=text)
        for pair in found
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    conversation = Conversation(id="c", messages=tuple(messages))
    one, two = rows_of(stated, conversation), rows_of(plain, conversation)
    if isinstance(two, str):
        assert one == two
        return
    assert len(one) == len(two) == 1
    for a, b in zip(one[0], two[0], strict=True):
        np.testing.assert_array_equal(a, b)
