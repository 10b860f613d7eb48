"""Masks of eight template families against golden files that were checked by hand: ⟦ ⟧ stand around what is supervised.

`python -m tests.unit.test_golden_masks` writes the files anew, to be read with `git diff` before they are believed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from transformers import GenerationConfig

from specforge.config import DataSettings
from specforge.data.formats import parse
from specforge.data.tokenize import TEMPLATES, ChatTokenizer
from tests import tiny
from tests.rows import shown as rows_shown

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
    """Its rows decoded, with ⟦ ⟧ around the supervised tokens, and what was left out; or why it is dropped."""
    _, conversation = parse({"conversations": messages}, "c")
    [found] = chat.examples([conversation], rules)
    if isinstance(found, str):
        return f"dropped: {found}"
    rows = "\n--- a further row\n".join(rows_shown(chat, masked) for masked in found.masked)
    return rows + "".join(f"\n--- not learned from: {turns} {reason}" for reason, turns in found.left_out.items())


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
def test_the_last_turn_alone(family, tmp_path):
    """The last row, with no more of it supervised than the last turn."""
    chat, expected = chat_of(family, tmp_path), golden(family)
    for name, messages in CASES.items():
        found = shown(chat, messages, DataSettings(max_length=4096, train_on="last-turn"))
        rows, *notes = expected[name].split("\n--- not learned from")
        last_row = rows.split("\n--- a further row\n")[-1]
        if "dropped" in found or notes or last_row.startswith("dropped"):
            continue
        before, _, last = last_row.rpartition("⟦")
        assert found == before.replace("⟦", "").replace("⟧", "") + "⟦" + last, name


def main() -> None:
    for family in FAMILIES:
        chat = chat_of(family, Path(sys.argv[1]))
        text = "".join(
            f"=== {name}\n{shown(chat, messages, DataSettings(max_length=4096))}\n" for name, messages in CASES.items()
        )
        (GOLDEN / f"{family}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
