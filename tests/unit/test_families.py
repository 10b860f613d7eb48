"""What 26 families of chat templates make of ten shapes of conversations: tests/golden/families.txt, read cell by cell,
and each row against what transformers renders.

`python -m tests.unit.test_families` writes the table. Read its `git diff` cell by cell before you commit it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from specforge.config import DataSettings
from specforge.data.formats import parse
from tests.families import FAMILIES, SHAPES, make
from tests.rows import shown

GOLDEN = Path(__file__).parents[1] / "golden" / "families.txt"
RULES = DataSettings(max_length=100_000)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return {name: make(name, tmp_path_factory.mktemp("family")) for name in FAMILIES}


def table(chats) -> str:
    """One block for each cell: its rows, or why there is none, then what was left out."""
    blocks = list[str]()
    for name, chat in chats.items():
        for shape, row in SHAPES.items():
            [found] = chat.examples([parse(row, "x")[1]], RULES)
            lines = [f"dropped: {found}"]
            if not isinstance(found, str):
                lines = [shown(chat, masked).replace("\n", "↵") for masked in found.masked]
                lines += [f"not learned from: {turns} {reason}" for reason, turns in found.left_out.items()]
            blocks.append("\n".join([f"## {name}: {shape}", *lines]))
    return "\n\n".join(blocks) + "\n"


def test_the_table_is_the_one_that_was_read(chats):
    assert table(chats) == GOLDEN.read_text(encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = {name: make(name, Path(folder) / name) for name in FAMILIES}
        GOLDEN.write_text(table(made), encoding="utf-8")
