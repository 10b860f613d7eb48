"""What a token takes on the disk in each codec, as `du` counts it, and how fast records are written and read.

    python benchmarks/store_size.py [--features STORE] [--scratch FOLDER]

Without --features: made-up records with H = 576, as SmolLM2 has it, 62 % supervised, 60 MB and more in bf16. With it:
the records of that store (made by prepare-hidden with --codec bf16). The bounds: bf16 at most
1.02 x (6H + 2H x teacher share + 16) bytes a token, fp8 at most 0.52 of bf16. Writing goes up to the commit of the last
shard (fsync), reading checks each record once; the median of --repetitions, files in the page cache. Results go to
benchmarks/results/, with date, machine, commit; exit code 1 where a bound does not hold.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from specforge.alignment import teacher_rows
from specforge.features.index import Manifest
from specforge.features.store import Store
from specforge.features.writer import StoreWriter
from specforge.records import FeatureRecord

ROOT = Path(__file__).parents[1]
CODECS = ("bf16", "fp8", "bf16+zstd", "fp8+zstd")
HIDDEN, RECORDS = 576, 120


def made_up(sample_id: int) -> FeatureRecord:
    """Turns of about 40 tokens, 62 % of them the assistant's; states as wide apart as a target's."""
    random = np.random.default_rng(sample_id)
    length = int(random.integers(20, 240))
    mask = np.arange(length) % 40 >= 15
    rows = len(teacher_rows(mask))

    def states(count: int) -> torch.Tensor:
        values = random.standard_normal((count, HIDDEN), dtype=np.float32) * random.lognormal(0, 1, HIDDEN)
        return torch.from_numpy(values).bfloat16()

    return FeatureRecord(
        sample_id=sample_id,
        token_ids=torch.from_numpy(random.integers(0, 49152, length, dtype=np.int32)),
        loss_mask=torch.from_numpy(mask),
        aux=states(3 * length).view(length, 3 * HIDDEN),
        last=states(rows),
        teacher_top1=torch.from_numpy(random.integers(0, 49152, rows, dtype=np.int32)),
        teacher_lse=torch.from_numpy(random.standard_normal(rows, dtype=np.float32)),
    )


def about(codec: str, count: int) -> Manifest:
    return Manifest(
        target="made up",
        target_fingerprint="",
        tokenizer_hash="",
        template_hash="",
        aux_layers=(1, 14, 26),
        data_hash="",
        max_length=2048,
        codec=codec,
        dtype="bfloat16",
        hidden_size=HIDDEN,
        num_records=count,
        tokens_per_batch=8192,
        engine="none",
    )


def disk_usage(folder: Path) -> int:
    """As `du`: blocks of 512 bytes, of the folder and its files."""
    return 512 * sum(path.stat().st_blocks for path in [folder, *folder.rglob("*")])


def written(folder: Path, manifest: Manifest, records: Iterable[FeatureRecord]) -> float:
    began = time.perf_counter()
    with StoreWriter(folder, manifest) as writer:
        for record in records:
            writer.add(record)
    return time.perf_counter() - began


def read(folder: Path) -> float:
    began = time.perf_counter()
    store = Store(folder)
    for index in range(len(store)):
        store.record(index).aux.sum()  # what a view maps is fetched when it is used
    return time.perf_counter() - began


def measure(records: list[FeatureRecord], manifest: Manifest, scratch: Path, repetitions: int) -> dict[str, object]:
    tokens = sum(len(record) for record in records)
    share = sum(len(record.last) for record in records) / tokens
    hidden = manifest.hidden_size
    result: dict[str, object] = {"records": len(records), "tokens": tokens, "teacher_share": share, "hidden": hidden}
    sizes = {}
    for codec in CODECS:
        writing, reading = [], []
        for _ in range(repetitions):
            shutil.rmtree(scratch / codec, ignore_errors=True)
            writing.append(written(scratch / codec, replace(manifest, codec=codec), records))
            reading.append(read(scratch / codec))
        sizes[codec] = disk_usage(scratch / codec)
        result[codec] = {
            "megabytes": sizes[codec] / 1e6,
            "bytes_a_token": sizes[codec] / tokens,
            "of_bf16": sizes[codec] / sizes["bf16"],
            "tokens_a_second_written": tokens / statistics.median(writing),
            "tokens_a_second_read": tokens / statistics.median(reading),
        }
    result["bf16_of_its_bound"] = sizes["bf16"] / tokens / (1.02 * (6 * hidden + 2 * hidden * share + 16))
    result["fp8_of_its_bound"] = sizes["fp8"] / sizes["bf16"] / 0.52
    return result


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{len(os.sched_getaffinity(0))} cores of {model}, no accelerator used"


def main() -> int:
    torch.set_num_threads(1)  # others may use the machine: threads that wait for each other would be what is timed
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, help="a store in bf16 (default: made-up records)")
    parser.add_argument("--scratch", type=Path, help="where stores are written (default: a temporary folder)")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    if options.features:
        store = Store(options.features)
        records, manifest, what = (
            [store.record(n) for n in range(len(store))],
            store.manifest,
            Path(store.manifest.target).name,
        )
        records = [replace(record, aux=record.aux.clone(), last=record.last.clone()) for record in records]
    else:
        records, manifest, what = [made_up(n) for n in range(RECORDS)], about("bf16", RECORDS), "made up"
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        result = measure(records, manifest, Path(scratch), options.repetitions)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    today = datetime.date.today().isoformat()
    content = {"date": today, "machine": machine(), "commit": commit, "source": what, **result}
    kind = "real" if options.features else "made-up"
    path = ROOT / "benchmarks" / "results" / f"store_size_{kind}_{len(os.sched_getaffinity(0))}-core-cpu_{today}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))
    print(f"in {path}")
    return int(max(result["bf16_of_its_bound"], result["fp8_of_its_bound"]) > 1)


if __name__ == "__main__":
    sys.exit(main())
