"""The target's weights as files: their headers, checked, and a fingerprint of all that they hold."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open

from specforge.console import advance, progress
from specforge.errors import EngineError, first_line
from specforge.files import read_json, replacing, seal, unseal

SHOWN = 4 << 30  # bytes; less is hashed before anybody asks what takes so long
INDEX = "model.safetensors.index.json"
PIECE = 16 << 20
VOLATILE_KEYS = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures"}


@dataclass(frozen=True)
class Entry:
    """A tensor in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


def headers(folder: Path) -> Iterator[tuple[Path, list[Entry]]]:
    """The tensors of each weights file, in the order in which they lie there. Raises EngineError where there is none,
    or a header is not what its file holds: safetensors looks at it first."""
    files = _files(folder)
    if not files:
        raise EngineError(
            "the target has no safetensors weights (pickled weights are never loaded)",
            where=str(folder),
            fix="convert it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)",
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise EngineError(
                f"the weights file is damaged: {first_line(error)}",
                where=str(file),
                fix="fetch or convert the target again",
            ) from error
        yield file, _entries(file)


def _files(folder: Path) -> list[Path]:
    """Those that SGLang loads: what the index names; without an index all of them, less Mistral's second copy."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = {str(name) for name in read_json(index)["weight_map"].values()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise EngineError(
                f"the index of the weights cannot be read: {first_line(error)}",
                where=str(index),
                fix="fetch or convert the target again",
            ) from error
        files = sorted(folder / name for name in names)
        for file in files:
            if file.parent != folder or not file.is_file():
                raise EngineError(
                    f"the index names {file.name}, which is not in the folder",
                    where=str(index),
                    fix="fetch the target again; the whole of it is needed",
                )
        return files
    files = sorted(folder.glob("*.safetensors"))
    if [file.name for file in files] == ["consolidated.safetensors", "model.safetensors"]:
        return files[1:]
    return files


def _entries(file: Path) -> list[Entry]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    found = [
        Entry(name, entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    ]
    return sorted(found, key=lambda entry: (entry.begin, entry.end))


def fingerprint(folder: Path) -> str:
    """A fine-tune of the same shape differs: config, and each tensor's name, shape, dtype and content. How the tensors
    are shared out over files does not matter. What a file holds is hashed once (`_hashes`)."""
    config = read_json(folder / "config.json")
    said = json.dumps({k: v for k, v in config.items() if k not in VOLATILE_KEYS}, sort_keys=True)
    files = list(headers(folder))
    unknown = sum(file.stat().st_size for file, _ in files if _known(file) is None)
    if unknown > SHOWN:
        with progress("reading the target's weights, once", unknown >> 20, "MiB") as bar:
            hashes = [_hashes(file, entries, lambda: advance(bar, PIECE >> 20)) for file, entries in files]
    else:
        hashes = [_hashes(file, entries) for file, entries in files]
    parts = [
        (entry.name, entry.dtype, entry.shape, of_file[entry.name])
        for (_, entries), of_file in zip(files, hashes, strict=True)
        for entry in entries
    ]
    return xxhash.xxh3_128_hexdigest((said + repr(sorted(parts))).encode())


def _hashes(file: Path, entries: list[Entry], read: Any = lambda: None) -> dict[str, str]:
    """{name: xxh3 of the tensor's bytes}; kept in the user's cache under the file's path, size, times and inode."""
    found = _known(file)
    if found is not None and found.keys() == {entry.name for entry in entries}:
        return found
    found = {}
    with file.open("rb") as stream:
        for entry in entries:
            digest, left = xxhash.xxh3_128(), entry.end - entry.begin
            stream.seek(entry.begin)
            while left and (piece := stream.read(min(left, PIECE))):
                digest.update(piece)
                left -= len(piece)
                read()
            found[entry.name] = digest.hexdigest()
    with suppress(OSError), replacing(_cached(file)) as out:  # no home, or a full one: hashed again next time
        out.write(seal({"of": _identity(file), "hashes": found}))
    return found


def _known(file: Path) -> dict[str, str] | None:
    try:
        kept = unseal(_cached(file).read_bytes())
    except OSError:
        return None
    return kept["hashes"] if kept and kept["of"] == _identity(file) else None


def _identity(file: Path) -> list[Any]:
    found = file.stat()
    return [str(file.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _cached(file: Path) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "specforge" / "weights" / f"{xxhash.xxh3_64_hexdigest(str(file.resolve()).encode())}.json"
