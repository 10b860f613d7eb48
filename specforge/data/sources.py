"""Where rows come from (for now local JSONL)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from specforge.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    name: str
    files: tuple[Path, ...]
    weight: float = 1.0
    origin: str = ""
    cached: bool = True


def resolve(dataset: Sequence[str]) -> list[Source]:
    return [Source(name=Path(d).name, files=(Path(d),), origin=d) for d in dataset]


def dataset_name(dataset: Sequence[str]) -> str:
    return "+".join(Path(d).stem for d in dataset)


def lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(
            f"the data file cannot be read: {error.strerror}",
            where=str(path),
            fix="give a readable JSONL file, one conversation a line",
        ) from error
    with file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line
