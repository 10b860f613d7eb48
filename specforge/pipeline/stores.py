"""Looking after feature stores: verify, info, merge."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import xxhash
from rich.table import Table

from specforge.config import StoreInfoSettings, StoreMergeSettings, StoreVerifySettings
from specforge.console import advance, console, progress, say, tracked
from specforge.errors import ConfigError, StoreError
from specforge.features import aside
from specforge.features.index import MANIFEST, Manifest, RecordLine, ShardLine, append_line, read_index
from specforge.features.shard import DAMAGE, damage
from specforge.features.store import Store
from specforge.files import sync_file, sync_folder

SPLITS = ("train", "test")


def store_verify(settings: StoreVerifySettings) -> None:
    """Every checksum of every store in the folder. Raises StoreError after all damage was shown."""
    found, unfinished = list[str](), list[str]()
    for folder in _stores(settings.folder).values():
        manifest, lines = Manifest.read(folder), read_index(folder)
        with progress(f"verifying {folder.name}", sum(line["bytes"] for line in lines), "bytes") as bar:
            for line in lines:
                for one in damage(folder, line, manifest.hidden_size):
                    found.append(f"{folder.name}/{one}")
                    console.print(found[-1], markup=False)
                advance(bar, line["bytes"])
        held = len({record["sample_id"] for line in lines for record in line["records"]})
        due = manifest.num_records - len(aside.reasons(folder))
        if held != due:
            unfinished.append(f"{folder.name} holds {held:,} of {due:,} records")
    if found:
        what = f"the store is damaged, in {len(found)} place(s); the first: {found[0]}"
        raise StoreError(what, where=str(settings.folder), fix=DAMAGE)
    if unfinished:
        raise StoreError(
            f"the store is unfinished: {'; '.join(unfinished)}; what it holds is as it was written",
            where=str(settings.folder),
            fix="run the same `specforge prepare-hidden` command again; it goes on where it was",
        )
    say(f"{settings.folder} is as it was written")


def store_info(settings: StoreInfoSettings) -> None:
    """What the index files say. No shard is touched."""
    for folder in _stores(settings.folder).values():
        manifest, lines = Manifest.read(folder), read_index(folder)
        table = Table(title=str(folder), show_header=False, title_justify="left")
        for name, value in asdict(manifest).items():
            table.add_row(name, str(value))
        table.add_section()
        records = [record for line in lines for record in line["records"]]
        facts = {"records in the store": f"{len(records):,} of {manifest.num_records:,}"}
        if found := aside.reasons(folder):
            facts["set aside"] = f"{len(found):,}, listed in {aside.SET_ASIDE}"
        for name, fact in (facts | _facts(records, sum(line["bytes"] for line in lines))).items():
            table.add_row(name, fact)
        console.print(table)
        if records:
            console.print(_histogram([record["tokens"] for record in records]))


def store_merge(settings: StoreMergeSettings) -> None:
    """One store out of several, or one for each split. The first store keeps its sample ids, the next ones follow."""
    if settings.output.exists():
        raise ConfigError("the output is there already", where=f"--output {settings.output}", fix="choose a new folder")
    given = [_stores(folder) for folder in settings.folders]
    for folder, stores in zip(settings.folders, given, strict=True):
        if set(stores) != set(given[0]):
            raise StoreError(
                "the folders hold other splits",
                where=f"{settings.folders[0]} and {folder}",
                fix="give folders that prepare-hidden wrote, or single stores",
            )
    groups = {name: [Store(stores[name]) for stores in given] for name in given[0]}
    manifests = {name: _merged(group) for name, group in groups.items()}
    beside = settings.output.with_name(f".{settings.output.name}.{os.getpid()}.tmp")
    try:
        for name, group in groups.items():
            _merge_into(beside / name, manifests[name], group)
        sync_folder(beside)
        beside.rename(settings.output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    sync_folder(settings.output.parent)
    records = sum(manifest.num_records for manifest in manifests.values())
    say(f"{records:,} records in {settings.output}")
    say(f"next: specforge train --features {settings.output}")


def _stores(folder: Path) -> dict[str, Path]:
    """By split where the folder is prepare-hidden's, else the one store that it is, without a name."""
    splits = {name: folder / name for name in SPLITS if (folder / name / MANIFEST).exists()}
    if not splits:
        return {"": folder}
    missing = [name for name in SPLITS if name not in splits]
    if missing:
        raise StoreError(
            f"half of the store is gone: there is a split {next(iter(splits))}, but no {missing[0]}",
            where=str(folder / missing[0] / MANIFEST),
            fix=f"bring it back from a copy, or name {folder / next(iter(splits))} to look at that split alone",
        )
    return splits


def _facts(records: list[RecordLine], size: int) -> dict[str, str]:
    tokens = sum(record["tokens"] for record in records)
    return {
        "tokens": f"{tokens:,}",
        "supervised": f"{sum(record['supervised'] for record in records) / max(tokens, 1):.1%}",
        "teacher rows": f"{sum(record['teachers'] for record in records) / max(tokens, 1):.1%}",
        "size": f"{size / 1e9:,.3f} GB",
        "bytes a token": f"{size / max(tokens, 1):,.0f}",
    }


def _histogram(lengths: Sequence[int]) -> Table:
    """Records by length, in doubling classes."""
    table = Table("tokens", "records", "", title="lengths", title_justify="left", box=None)
    counts = np.bincount(np.log2(np.maximum(lengths, 1)).astype(np.int64))
    for power in range(int(np.flatnonzero(counts)[0]), len(counts)):
        bar = "█" * round(40 * counts[power] / counts.max())
        table.add_row(f"{2**power:,} - {2 ** (power + 1) - 1:,}", f"{counts[power]:,}", bar)
    return table


def _merged(stores: list[Store]) -> Manifest:
    """The manifest of the merged store. Raises StoreError where the stores are not of one kind, naming the field."""
    first, hashes = stores[0].manifest, list[str]()
    for store in stores:
        other = store.manifest
        different = first.differences(other, but=("data_hash", "num_records", "max_length"))
        if different:
            name = different[0]
            raise StoreError(
                f"the stores were made with another {name}: {getattr(first, name)} and {getattr(other, name)}",
                where=f"{store.folder}/{MANIFEST}, '{name}'",
                fix="merge stores of the same target, tokenizer, template, layers, codec, dtype and engine",
            )
        if other.data_hash in hashes:
            raise StoreError(
                "two of the stores hold the same data",
                where=f"{store.folder}/{MANIFEST}, 'data_hash'",
                fix="give each store once",
            )
        hashes.append(other.data_hash)
    return replace(
        first,
        data_hash=xxhash.xxh3_128_hexdigest(" ".join(hashes).encode()),
        num_records=sum(len(store) for store in stores),  # what was set aside is left out
        max_length=max(store.manifest.max_length for store in stores),
    )


def _merge_into(folder: Path, manifest: Manifest, stores: list[Store]) -> None:
    """Shards of the second store become those of writers that follow the first store's, and so on."""
    folder.mkdir(parents=True)
    manifest.write(folder)
    first_writer = first_id = 0
    for store in stores:
        lines = read_index(store.folder)
        for line in tracked(lines, f"merging {store.folder}", len(lines), "shards"):
            writer = first_writer + line["writer"]
            name = f"shard-{writer}-{line['file'].split('-')[2]}"
            _link(store.folder / line["file"], folder / name)
            records = [RecordLine(**(r | {"sample_id": r["sample_id"] + first_id})) for r in line["records"]]
            append_line(folder, ShardLine(**(line | {"file": name, "writer": writer, "records": records})))
        first_writer += 1 + max(line["writer"] for line in lines)
        first_id += 1 + max(record["sample_id"] for line in lines for record in line["records"])


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where that cannot be."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(source, target)
        sync_file(target)
