"""Where conversations come from: what the user names becomes local files. `lines` reads them."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import xxhash
from rich.markup import escape as plain

from specforge.console import say
from specforge.data.lines import SUFFIXES, suffix_of
from specforge.errors import ConfigError, DataError

# Names that stand for repositories, the later ones for the case that the earlier cannot be had: (repository, files)
HOMES = {
    "ultrachat": (("HuggingFaceH4/ultrachat_200k", ("data/train_sft-*.parquet",)),),
    "sharegpt": (
        ("anon8231489123/ShareGPT_Vicuna_unfiltered", ("ShareGPT_V3_unfiltered_cleaned_split.json",)),
        ("RyokoAI/ShareGPT52K", ("sg_90k_part1.json", "sg_90k_part2.json")),
    ),
}
MIX = ("ultrachat", "sharegpt")
REPOSITORY = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+))?", re.ASCII)  # org/name, org/name:SPLIT
TRAIN = re.compile(r"(?<![a-z])train(ing)?(?![a-z])")
HELD_OUT = re.compile(r"(?<![a-z])(test|testing|valid|validation|val|dev|eval|evaluation|holdout)(?![a-z])")
NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "metadata.json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One data set as local files."""

    name: str  # as the user says it: "ultrachat", "org/name", "rows.jsonl"
    files: tuple[Path, ...]  # in order
    weight: float = 1.0  # share of its conversations to keep, 0 < weight <= 1
    origin: str  # "org/name@commit", or the path
    cached: bool  # nothing was downloaded


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """What the user wrote, taken apart."""

    name: str
    weight: float
    path: Path | None = None
    repo: str | None = None
    split: str | None = None


def resolve(dataset: Sequence[str]) -> list[Source]:
    """The data sets, downloaded where they are not in the cache yet.

    Each entry is `ultrachat`, `sharegpt`, `mix` (both of them), `org/name` or `org/name:SPLIT` of the hub, or the path
    of a file or folder; behind each may stand `=WEIGHT`. Raises ConfigError for what cannot be meant, DataError for
    what cannot be had. Paths are looked at before anything is downloaded.
    """
    entries = _entries(dataset)
    local = {entry: _local_files(entry.path) for entry in entries if entry.path is not None}
    return [
        Source(name=entry.name, files=local[entry], weight=entry.weight, origin=str(entry.path), cached=True)
        if entry in local
        else _from_hub(entry)
        for entry in entries
    ]


def dataset_name(dataset: Sequence[str]) -> str:
    """A folder name for what is made of these data sets: "ultrachat", "rows", "org--name", "a+b". It is one plain name
    of at most 100 bytes, without a separator or a dot in front. Uses no network."""
    names = []
    for entry in [_entry(text) for text in _given(dataset)]:
        name = entry.name
        if entry.path is not None:
            name = re.sub(r"\.(parquet|jsonl?(\.gz|\.zst)?)$", "", entry.path.name, flags=re.IGNORECASE)
        names.append(re.sub(r"[^\w.-]+", "-", name.replace("/", "--")).strip(".-") or "data")
    joined = "+".join(names)
    if len(joined.encode()) > 100:
        joined = f"{joined[:20]}-{xxhash.xxh3_64_hexdigest(joined.encode())}"
    return joined


def _given(dataset: Sequence[str]) -> Sequence[str]:
    if not dataset:
        raise ConfigError("no data set is named", where="--dataset", fix=_forms())
    return dataset


def _entries(dataset: Sequence[str]) -> list[_Entry]:
    """All entries, `mix` as its two parts."""
    entries = list[_Entry]()
    for text in _given(dataset):
        entry = _entry(text)
        names = MIX if entry.name == "mix" else [entry.name]
        for name in names:
            if any(name == earlier.name for earlier in entries):
                raise ConfigError(f"{name} is named twice", where=f"--dataset {text}", fix="name each data set once")
            entries.append(entry if name == entry.name else _Entry(name=name, weight=entry.weight))
    return entries


def _entry(text: str) -> _Entry:
    where = f"--dataset {text}"
    name, equals, number = text.rpartition("=")
    if not equals or os.path.exists(os.path.expanduser(text)):
        name, number = text, "1"
    try:
        weight = float(number)
    except ValueError:
        weight = 0.0
    if not 0 < weight <= 1:
        raise ConfigError(
            f"'{number}' is no weight", where=where, fix="give a share over 0 and up to 1 behind '=', or nothing"
        )
    if name in HOMES or name == "mix":
        return _Entry(name=name, weight=weight)
    path = os.path.expanduser(name)
    if os.path.exists(path) or name.startswith(("/", "./", "../", "~")) or name.lower().endswith(SUFFIXES):
        return _Entry(name=name, weight=weight, path=Path(path))
    found = REPOSITORY.fullmatch(name)
    if found:
        return _Entry(name=name, weight=weight, repo=found[1], split=found[2])
    near = difflib.get_close_matches(name.lower(), [*HOMES, "mix"], n=1)
    raise ConfigError(
        f"'{name}' is no data set that is known, and no file",
        where=where,
        fix=f"did you mean {near[0]}?" if near else _forms(),
    )


def _forms() -> str:
    return f"give {', '.join(HOMES)}, mix, the path of a file ({', '.join(SUFFIXES[:3])}) or org/name of the hub"


def _local_files(path: Path) -> tuple[Path, ...]:
    if os.path.isdir(path):
        names = [
            str(file.relative_to(path))
            for file in path.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        return tuple(path / name for name in choose_train(str(path), names))
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for its other end
        raise DataError("the data file is no regular file", where=str(path), fix="write its content to a file first")
    try:
        path.open("rb").close()
    except OSError as error:
        siblings = os.listdir(path.parent) if os.path.isdir(path.parent) else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        raise DataError(
            f"the data file cannot be read: {error.strerror}",
            where=str(path),
            fix=f"did you mean {path.parent / near[0]}?" if near else "give a readable file of conversations",
        ) from error
    suffix_of(path)
    return (path,)


def choose_train(where: str, names: Sequence[str]) -> list[str]:
    """Of the files of a repository or folder those of the train split, all of one format: Parquet before JSONL before
    JSON. Files with "train" in their path where there are any, else all but those of other splits."""
    data = [name for name in names if name.lower().endswith(SUFFIXES) and Path(name).name not in NO_ROWS]
    data = [name for name in data if not HELD_OUT.search(name.lower())]
    data = [name for name in data if TRAIN.search(name.lower())] or data
    for suffix in SUFFIXES:
        chosen = sorted(name for name in data if name.lower().endswith(suffix))
        if chosen:
            return chosen
    raise DataError(
        f"there is no file of a train split ({', '.join(SUFFIXES[:3])}) among {len(names)} files",
        where=where,
        fix="name the split (org/name:SPLIT), or the files themselves",
    )


def choose_matching(where: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Of the files of a repository those that match; DataError where a pattern has no match."""
    chosen = list[str]()
    for pattern in patterns:
        found = sorted(n for n in names if fnmatchcase(n, pattern) and n.lower().endswith(SUFFIXES))
        if not found:
            raise DataError(
                f"there is no file {pattern} among {len(names)} files", where=where, fix="see what is there"
            )
        chosen += found
    return chosen


def _from_hub(entry: _Entry) -> Source:
    from specforge.data import hub  # here, because it takes a second to import

    homes: Sequence[tuple[str, Sequence[str]]] = HOMES.get(entry.name, ())
    if entry.repo is not None:
        homes = [(entry.repo, [f"*{entry.split}*"] if entry.split else [])]
    failures = list[DataError]()
    for repo, patterns in homes:
        if failures:
            say(plain(f"{failures[-1].what}\n{entry.name}: taking {repo} instead"))
        choose = partial(choose_matching, repo, patterns) if patterns else partial(choose_train, repo)
        try:
            got = hub.fetch(repo, choose)
        except DataError as error:
            failures.append(error)
            continue
        origin = f"{repo}@{got.commit}"
        return Source(name=entry.name, files=got.files, weight=entry.weight, origin=origin, cached=got.cached)
    if len(failures) == 1:
        raise failures[0]
    raise DataError(
        f"none of the places of {entry.name} has it: " + "; ".join(failure.what for failure in failures),
        where=", ".join(failure.where for failure in failures),
        fix="check the network; or get such conversations by other means, and give their file as a path",
    )
