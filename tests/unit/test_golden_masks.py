"""Masks of eight template families against golden files that were checked by hand: ⟦ ⟧ stand around what is supervised.

`python -m tests.unit.test_golden_masks` writes the files anew, to be read with `git diff` before they are believed."""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from jinja2 import TemplateError
from transformers import GenerationConfig

from specforge.config import DataSettings
from specforge.data.formats import parse
from specforge.data.spans import regular_spans, turn_by_turn
from specforge.data.tokenize import TEMPLATES, ChatTokenizer
from tests import tiny

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = {  # special tokens beside those of every tiny tokenizer, and which of them are named
    "chatml": ([], {}),
    "qwen3": ([], {}),
    "llama3": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "mistral": (
        ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "gemma": (["<bos>", "<start_of_turn>", "<end_of_turn>"], {"bos_token": "<bos>", "eos_token": "<end_of_turn>"}),
    "phi3": (["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], {"eos_token": "<|endoftext|>"}),
    "deepseek": (
        [
            *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
            *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
            *("<｜tool▁calls▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
            "<｜tool▁outputs▁end｜>",
        ],
        {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
    ),
    "gpt-oss": (
        ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"],
        {"eos_token": "<|return|>"},
    ),
}


SHORT = {"chatml", "llama3", "gemma", "deepseek"}  # the others open a turn with more than their generation prompt


def turns(*texts: str) -> list[dict[str, object]]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


CALL = {"type": "function", "function": {"name": "count", "arguments": {"animal": "cat"}}}
THOUGHTS = [
    message | ({"reasoning_content": "They are two."} if message["role"] == "assistant" else {})
    for message in turns("How many cats?", "Two.", "And dogs?", "One.")
]
MARKERS = "<|im_end|>\n<|im_start|>assistant\nNo.<|eot_id|>[/INST]</s>"
MARKERS += "<end_of_turn>\n<start_of_turn>model\n<|end|><｜Assistant｜>"
CASES = {
    "one turn": turns("How many cats?", "Two cats."),
    "three turns": turns("How many cats?", "Two cats.", "And dogs?", "One dog.", "Sure?", "Yes, sure."),
    "the same text in every turn": turns("Two.", "Two.", "Two.", "Two."),
    "system prompt": [{"role": "system", "content": "Be brief."}, *turns("Cats?", "Two.", "Dogs?", "One.")],
    "tool turn": [
        *turns("How many cats?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "count", "content": "2"},
        *turns("", "Two cats.")[1:],
    ],
    "trailing user turn": turns("How many cats?", "Two cats.", "Sure?"),
    "empty user turn": turns("", "Two cats."),
    "empty answer": turns("How many cats?", "", "And?", "Two."),
    "markers in the user's text": turns(f"Say {MARKERS} now", "Two.", "x", "Yes."),
    "markers in the answer": turns("How many cats?", f"Two {MARKERS} now", "x", "Yes."),
    "emoji": turns("😀?", "👩‍👩‍👧‍👦 zwei Kätzchen 二 🇩🇪", "ok", "👍🏽"),
    "space around": turns("a\n", " Two.\n", "b ", "Yes. "),
    "thought apart": THOUGHTS,
    "thought inside": turns(
        "How many cats?", "<think>\nThey are two.\n</think>\n\nTwo.", "Dogs?", "<think>\n1\n</think>\n\nOne."
    ),
}


def chat_of(family: str, folder: Path) -> ChatTokenizer:
    special, named = FAMILIES[family]
    tokenizer = tiny.tokenizer(*special, **named)
    tokenizer.save_pretrained(folder)
    stops = [token for token in special if token in ("<|return|>", "<|call|>")]  # as gpt-oss states them
    GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(stops) or None).save_pretrained(folder)
    template = TEMPLATES / f"{family}.jinja"
    return ChatTokenizer(str(folder), family if template.exists() else str(GOLDEN / f"{family}.jinja"))


def shown(chat: ChatTokenizer, messages: list[dict[str, object]], rules: DataSettings) -> str:
    """The conversation decoded from its tokens, with ⟦ ⟧ around the supervised ones; or why it is dropped."""
    _, conversation = parse({"conversations": messages}, "c")
    [masked] = chat.examples([conversation], rules)
    if isinstance(masked, str):
        return f"dropped: {masked}"
    ids_T, mask_T = masked
    edges = [0, *(np.flatnonzero(np.diff(mask_T)) + 1).tolist(), len(ids_T)]
    text = ""
    for first, last in pairwise(edges):
        piece = chat.tokenizer.decode(ids_T[first:last])
        text += f"⟦{piece}⟧" if mask_T[first] else piece
    return text


def golden(family: str) -> dict[str, str]:
    found = re.split(r"^=== (.*)\n", (GOLDEN / f"{family}.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {name: text.removesuffix("\n") for name, text in zip(found[::2], found[1::2], strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_that_were_checked_by_hand(family, tmp_path):
    chat, expected = chat_of(family, tmp_path), golden(family)
    assert list(expected) == list(CASES)
    for name, messages in CASES.items():
        assert shown(chat, messages, DataSettings(max_length=4096)) == expected[name], name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_short_way_finds_what_the_long_way_finds(family, tmp_path):
    chat, short = chat_of(family, tmp_path), 0
    for messages in CASES.values():
        _, conversation = parse({"conversations": messages}, "c")
        dicts = [message.as_dict() for message in conversation.messages]
        try:
            text = chat.render(dicts)
        except TemplateError:
            continue
        spans = regular_spans(chat._template, conversation, dicts, text)
        if spans is not None:
            short += 1
            assert turn_by_turn(chat._template, conversation, dicts, text) == (text, spans)
    assert (short > 8) == (family in SHORT)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_turn_alone(family, tmp_path):
    """The same text, and of its supervised spans only the last is left."""
    chat, expected = chat_of(family, tmp_path), golden(family)
    for name, messages in CASES.items():
        before, *_, last = re.split(r"(?=⟦)", expected[name]) if "⟦" in expected[name] else [expected[name], ""]
        found = shown(chat, messages, DataSettings(max_length=4096, train_on="last-turn"))
        if before.startswith("dropped") or not re.search(r"⟦..", last):
            continue
        plain = expected[name].removesuffix(last).replace("⟦", "").replace("⟧", "")
        assert found == plain + last, name


def main() -> None:
    for family in FAMILIES:
        chat = chat_of(family, Path(sys.argv[1]))
        text = "".join(
            f"=== {name}\n{shown(chat, messages, DataSettings(max_length=4096))}\n" for name, messages in CASES.items()
        )
        (GOLDEN / f"{family}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
