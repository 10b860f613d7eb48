"""Random conversations through each template family: what is supervised is what the assistant said, nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specforge.config import DataSettings
from specforge.data.tokenize import ChatTokenizer
from specforge.records import Conversation, Message
from tests import tiny
from tests.unit.test_golden_masks import FAMILIES, chat_of

RULES = DataSettings(max_length=100_000)
ENDS = {
    "chatml": ["<|im_end|>"],
    "qwen3": ["<|im_end|>"],
    "llama3": ["<|eot_id|>"],
    "mistral": ["</s>"],
    "gemma": ["<end_of_turn>"],
    "phi3": ["<|end|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "gpt-oss": ["<|end|>", "<|return|>"],
}
BEFORE = {"qwen3": ["", "<think>\n\n</think>\n\n"], "gpt-oss": ["<|channel|>final<|message|>"]}
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
    [masked] = chat.examples([Conversation(id="c", messages=tuple(messages))], RULES)
    answers = [answered.strip() if family in TRIMS else answered for _, answered in found]
    if isinstance(masked, str):  # a dropped row is no false mask; but only for a reason that is there
        assert "nothing to predict" in masked
        assert not any(answers)
        return
    told = supervised(chat, masked)
    assert len(told) == len(answers)
    for text, answer in zip(told, answers, strict=True):
        allowed = [before + answer.lstrip("\n") * bool(before) + answer * (not before) + end
                   for before in BEFORE.get(family, [""]) for end in ENDS[family]]  # fmt: skip
        allowed += [before + answer + end for before in BEFORE.get(family, [""]) for end in ENDS[family]]
        assert text in allowed


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
def test_a_template_that_states_its_spans_gives_the_same_mask(tmp_path_factory, inside, outside, found):
    """Whether the block holds the end of the turn, the line end behind it, or neither."""
    folder = tmp_path_factory.mktemp("stated")
    template = GENERATION.replace("INSIDE", f"'{inside}'").replace("OUTSIDE", f"'{outside}'")
    tiny.tokenizer(chat_template=template).save_pretrained(folder)
    stated = ChatTokenizer(str(folder))
    messages = [
        Message(role=role, content=text)
        for pair in found
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    conversation = Conversation(id="c", messages=tuple(messages))
    [one] = stated.examples([conversation], RULES)
    stated.tokenizer.chat_template = tiny.CHATML
    [two] = stated.examples([conversation], RULES)
    if isinstance(two, str):
        assert one == two
        return
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
