"""Run by test_equality.py: captures a folder of data with two replicas of two ranks, then with one replica of two, and
compares each record with the same conversation alone on one rank. Prints one JSON line.

    equality_worker.py TARGET DATA OUTPUT"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

from specforge import hardware, launch
from specforge.config import EngineSettings, PrepareHiddenSettings
from specforge.features.index import read_index
from specforge.features.store import Store
from specforge.pipeline.capture import prepare_hidden
from specforge.records import Example
from specforge.target import engine as engines
from specforge.target import weights
from tests.parity.forked import run_ranks
from tests.parity.sglang_worker import error


def capture(target: Path, data: Path, output: Path) -> None:
    settings = PrepareHiddenSettings(
        model_path=str(target),
        data=data,
        output=output,
        tp_size=2,
        tokens_per_batch=400,
        engine="sglang",
        dtype=hardware.name(weights.describe(str(target)).dtype),
    )
    assert prepare_hidden(settings) is None


def compare(target: Path, folder: Path) -> None:
    info, ranks = weights.describe(str(target)), launch.join(1)
    engine = engines.load(
        EngineSettings(engine="sglang", tokens_per_batch=1024, dtype=hardware.name(info.dtype)), info, ranks
    )
    store, head = Store(folder), weights.load_head(info, info.dtype)
    worst = dict.fromkeys(("aux", "last", "lse", "head_lse", "another"), 0.0)
    worst["another"] = 1e9
    same = total = 0
    for index in range(len(store)):
        got = store.record(index)
        example = Example(
            sample_id=index,
            token_ids=got.token_ids.numpy().astype(np.int32),
            loss_mask=got.loss_mask.numpy(),
        )
        (want,) = engine.capture([example])
        logits = head.logits(got.last)
        for name, pair in {
            "aux": (got.aux, want.aux),
            "last": (got.last, want.last),
            "lse": (got.teacher_lse, want.teacher_lse),
            "head_lse": (got.teacher_lse, logits.logsumexp(-1)),
        }.items():
            worst[name] = max(worst[name], error(*pair))
        worst["another"] = min(worst["another"], error(got.aux[1:], want.aux[:-1]))
        same += int((logits.argmax(-1) == got.teacher_top1).sum() + (want.teacher_top1 == got.teacher_top1).sum())
        total += 2 * len(logits)
    print(json.dumps({**worst, "records": len(store), "top1": same / total}), flush=True)


def main() -> None:
    target, data, output = map(Path, sys.argv[1:])
    run_ranks(4, partial(capture, target, data, output / "four"))
    run_ranks(2, partial(capture, target, data, output / "two"))
    four, two = (
        {record["sample_id"]: record["xxh3"] for line in index for record in line["records"]}
        for index in (read_index(output / "four" / "train"), read_index(output / "two" / "train"))
    )
    writers = {line["writer"] for line in read_index(output / "four" / "train")}
    print(json.dumps({"same_bytes": four == two, "writers": len(writers)}), flush=True)
    run_ranks(1, partial(compare, target, output / "four" / "train"))


if __name__ == "__main__":
    main()
