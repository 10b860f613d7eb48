"""Kills of whole commands at random instants, by SIGKILL: `python -m tests.faults.kills --kills 200 --output FILE`.

Each command runs once unbroken. Then it is killed at an instant drawn from its duration, one time in three once more
while it goes on, and finished by the same command; what it leaves must be what the unbroken run left."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from specforge.features.store import Store
from tests import tiny, warm
from tests.e2e.test_commands import FP32, command
from tests.stores import assert_same

ROOT = Path(__file__).parents[2]
TIMED = ("tokens_per_second", "supervised_tokens_per_second", "time_share")
MODEL = ["--model-path", "target"]
TRAIN = (
    "--deepspeed-config ds.json --draft-vocab-size 200 --epochs 2 --row-tokens 256 --batch-size 2 --max-length 256 "
    "--lr 1e-3 --save-steps 4 --output out/run"
).split()
DRAFT = ["--draft", "trained/best", "--data", "data", "--max-length", 256, "--num-prompts", 4, "--max-new-tokens", 12]


def texts(folder: Path) -> Any:
    """All files, byte by byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if _counts(path)}


def _counts(path: Path) -> bool:
    return path.is_file() and not path.name.startswith((".lock", "events.out")) and path.suffix != ".log"


def prepared(folder: Path) -> Any:
    return {name: content for name, content in texts(folder).items() if name.endswith(".jsonl") or "vocab" in name}


def stores(folder: Path) -> Any:
    """The records, in order: batches follow from data and settings, shards from where the run was broken."""
    return [Store(folder / "features" / split) for split in ("train", "test")]


def trained(folder: Path) -> Any:
    """Losses and measurements of all steps, and every weight and moment."""
    run = folder / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    tensors = {name: load_file(newest / name) for name in ("model.safetensors", "optimizer.safetensors")}
    best = load_file(run / "best" / "model.safetensors")
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows], newest.name, tensors, best


def measured(folder: Path) -> Any:
    found = json.loads((folder / "result.json").read_text())
    return found["teacher_forced"], {
        k: v for k, v in found["decode"].items() if k not in ("speed_up", *TIMED) and "second" not in k
    }


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, Store):
        assert len(one) == len(two)
        for index in range(len(one)):
            assert_same(one.record(index), two.record(index))
        return True
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


Kind = tuple[list[Any], Callable[[Path], Any], int]  # the command, what it leaves, ranks
KINDS: dict[str, Kind] = {
    "prepare-data": (
        ["prepare-data", "--dataset", "many.jsonl", *MODEL, "--output", "out/data", "--workers", 2], prepared, 1
    ),
    "regenerate": (
        ["regenerate", *MODEL, "--engine", "hf", "--prompts", "prompts.jsonl", "--output", "out/answers.jsonl",
         "--max-new-tokens", 12, "--concurrency", 4], texts, 1,
    ),
    "prepare-hidden": (
        ["prepare-hidden", *MODEL, "--data", "data", "--output", "out/features", "--tokens-per-batch", 256,
         "--shard-mb", 1], stores, 1,
    ),
    "train, offline": (["train", *MODEL, "--features", "features", "--no-deepspeed", *TRAIN], trained, 1),
    "train, offline, ZeRO 2": (["train", *MODEL, "--features", "features", *TRAIN], trained, 1),
    "train, offline, ZeRO 2, two ranks": (["train", *MODEL, "--features", "features", *TRAIN], trained, 2),
    "train, online": (["train", *MODEL, "--online", "--data", "data", *TRAIN], trained, 1),
    "train, cached": (
        ["train", *MODEL, "--online", "--data", "data", "--features", "out/kept", *TRAIN], trained, 1
    ),
    "benchmark": (["benchmark", *MODEL, *DRAFT, "--output", "out/result.json"], measured, 1),
}  # fmt: skip


def run(arguments: list[Any], folder: Path, ranks: int = 1, killed_after: float | None = None) -> bool:
    """False where it was killed before its end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    try:
        done = warm.run(command(*arguments), folder, environment, killed_after or 300, ranks)
    except subprocess.TimeoutExpired:
        if killed_after is None:
            raise
        return False
    assert done.returncode == 0, done.stdout[-3000:]
    return True


def inputs(folder: Path) -> Path:
    """Target, data, features and a draft, which the commands share."""
    tiny.make_target(folder / "target")
    tiny.write_jsonl(folder / "rows.jsonl", tiny.conversations(60))
    tiny.write_jsonl(folder / "many.jsonl", tiny.conversations(4000, seed=1))
    tiny.write_jsonl(folder / "prompts.jsonl", tiny.conversations(40, seed=2))
    (folder / "ds.json").write_text(json.dumps(FP32))
    run(["prepare-data", "--dataset", "rows.jsonl", *MODEL, "--output", "data", "--test-share", 0.2], folder)
    run([*KINDS["prepare-hidden"][0][:5], "--output", "features", "--tokens-per-batch", 256, "--shard-mb", 1], folder)
    run(["train", *MODEL, "--features", "features", *TRAIN, "--output", "trained"], folder)
    return folder


def campaign(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """{kind: what came of its kills}. The kills are shared out evenly; the seed draws their instants."""
    found = dict[str, Any]()
    for at, (kind, (arguments, left, ranks)) in enumerate(KINDS.items()):
        source, wanted = random.Random(f"{seed} {kind}"), (kills + at) // len(KINDS)
        began = time.monotonic()
        run(arguments, folder, ranks)
        seconds = time.monotonic() - began
        (folder / "out").rename(folder / "unbroken")
        (folder / "out").mkdir()
        done, sequences, equal, instants = 0, 0, 0, list[float]()
        while done < wanted:
            again = source.random() < 1 / 3
            for _ in range(2 if again and done + 1 < wanted else 1):
                instant = source.uniform(0.02, 1.0) * seconds
                if run(arguments, folder, ranks, instant):
                    break  # it was faster, and is finished
                done += 1
                instants.append(round(instant, 3))
            run(arguments, folder, ranks)
            one, two = left(folder / "unbroken"), left(folder / "out")
            sequences, equal = sequences + 1, equal + same(one, two)
            shutil.rmtree(folder / "out")
            (folder / "out").mkdir()
        found[kind] = {
            "kills": done, "resumes": sequences, "unbroken_seconds": round(seconds, 2), "instants": instants,
            "finished_equal": equal,
        }  # fmt: skip
        print(kind, found[kind], flush=True)
        shutil.rmtree(folder / "unbroken")
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="specforge-kills-") as folder:
        found = campaign(inputs(Path(folder)), chosen.kills, chosen.seed)
    result = {"seed": chosen.seed, "kills": sum(one["kills"] for one in found.values()), "commands": found}
    if chosen.output:
        chosen.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
