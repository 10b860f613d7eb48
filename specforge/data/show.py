"""Rows as the draft will learn from them: every token, its border, and whether it is supervised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from numpy.typing import NDArray
from rich.text import Text

BROKEN = "\ufffd"
STYLES = {  # (supervised, second of two shades) -> style on the terminal
    (True, False): "black on green",
    (True, True): "black on bright_green",
    (False, False): "default",
    (False, True): "default on grey23",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A token, or the few tokens that make up one character together."""

    text: str
    token_ids: tuple[int, ...]
    supervised: bool
    special: bool


@dataclass(frozen=True, slots=True)
class Row:
    place: str  # "rows.jsonl:12"
    id: str
    pieces: list[Piece]


def pieces(tokenizer: Any, ids_T: NDArray[Any], mask_T: NDArray[Any]) -> list[Piece]:
    """A token whose bytes are no whole character is shown with those that complete it, where they are alike masked."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    found, waiting = list[Piece](), list[int]()
    for at, (token, supervised) in enumerate(zip(ids_T.tolist(), mask_T.tolist(), strict=True)):
        waiting.append(token)
        text = str(tokenizer.decode(waiting, clean_up_tokenization_spaces=False))
        last = at + 1 == len(ids_T) or bool(mask_T[at + 1]) != supervised or len(waiting) == 4
        if text.endswith(BROKEN) and not last:
            continue
        found.append(Piece(text, tuple(waiting), bool(supervised), token in special))
        waiting = []
    return found


def coloured(row: Row, brackets: bool) -> Text:
    """For a terminal: supervised tokens on green, two shades in turn; special tokens in bold. With `brackets`, for
    where colours are lost, ⟦ ⟧ stand around what is supervised."""
    shown = Text(f"── {row.place}  {row.id}  ", style="bold cyan")
    shown.append(f"{sum(p.supervised for p in row.pieces)} of {len(row.pieces)} supervised\n", style="cyan")
    for number, piece in enumerate(row.pieces):
        style = STYLES[piece.supervised, number % 2 == 1]
        if brackets and piece.supervised != (number > 0 and row.pieces[number - 1].supervised):
            shown.append("⟦" if piece.supervised else "⟧")
        shown.append(_visible(piece.text), style=f"bold {style}" if piece.special else style)
        if "\n" in piece.text:
            shown.append("\n")
    return shown.append("⟧") if brackets and row.pieces and row.pieces[-1].supervised else shown


def page(rows: Sequence[Row], target: str) -> str:
    """The same as one self-contained HTML page."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    return environment.get_template("show.html.jinja").render(rows=rows, target=target, visible=_visible)


def _visible(text: str) -> str:
    """Line ends and other white space that would not be seen, by signs."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
