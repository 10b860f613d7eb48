"""The kinds of acceptance length side by side: three ways to the same figure, which must not contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from rich.markup import escape
from rich.table import Table

from specforge.console import console, is_main_rank, say

APART = 0.05  # of the smaller: what two kinds may differ by without a warning
KINDS = {  # title -> where it stands in a benchmark's JSON
    "teacher-forced walk": ("teacher_forced", "walk_length"),
    "decoding in process": ("decode", "acceptance_length"),
    "through the server": ("served", "acceptance_length"),
}


def side_by_side(result: Mapping[str, Any]) -> dict[str, Any]:
    """{"kinds": {title: length}, "disagreements": [[title, title, share]]} of a benchmark's result, shown as a table
    with a warning for each disagreement of two that draft alike. What was not measured is None."""
    found = {title: (result.get(part) or {}).get(key) for title, (part, key) in KINDS.items()}
    shapes = _shapes(result)
    apart = [
        (one, two, share)
        for one, two, share in disagreements({title: length for title, length in found.items() if length is not None})
        if all(None in pair or pair[0] == pair[1] for pair in zip(shapes[one], shapes[two], strict=True))
    ]
    if is_main_rank():
        _show(found, result)
    for one, two, share in apart:
        say(
            f"[yellow]warning[/] {one} and {two} differ by {share:.1%}: compare text, steps and target; "
            "docs/serving.md, 'Three ways to one figure', has the causes"
        )
    return {"kinds": found, "disagreements": [list(pair) for pair in apart]}


def _shapes(result: Mapping[str, Any]) -> dict[str, tuple[int | None, int | None, int | None]]:
    """(steps, top-k, draft tokens) of each kind, None for what is not known. The walk's is a chain."""
    decoded, served = result.get("decode") or {}, (result.get("served") or {}).get("speculative") or {}
    steps = result.get("steps")
    walked = (steps, 1, None if steps is None else steps + 1)
    shapes = (
        walked,
        (decoded.get("steps"), decoded.get("top_k"), decoded.get("draft_tokens")),
        (served.get("steps"), served.get("topk"), served.get("draft_tokens")),
    )
    return dict(zip(KINDS, shapes, strict=True))


def disagreements(lengths: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """Pairs that differ by more than APART, and by which share of the smaller."""
    shares = [(one, two, _share(lengths[one], lengths[two])) for one, two in combinations(lengths, 2)]
    return [found for found in shares if found[2] > APART]


def _share(one: float, two: float) -> float:
    return abs(one - two) / min(one, two)


def _show(found: Mapping[str, float | None], result: Mapping[str, Any]) -> None:
    texts = {
        "teacher-forced walk": "held-out text",
        "decoding in process": result.get("questions") or "prompts of the held-out text",
        "through the server": (result.get("served") or {}).get("questions", ""),
    }
    shapes = _shapes(result)
    table = Table("acceptance length", title="side by side", title_justify="left")
    for name in ("tokens a pass", "text", "steps", "top-k", "draft tokens"):
        table.add_column(name, justify="right")
    for title, length in found.items():
        if length is not None:
            shape = ("?" if part is None else str(part) for part in shapes[title])
            table.add_row(title, f"{length:.3f}", escape(texts[title]), *shape)
    console.print(table)
