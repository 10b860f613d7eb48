"""Run by test_sglang.py: many targets against transformers. Prints one JSON line for each.

families_worker.py TP_SIZE TARGET [TARGET ...]"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch.distributed as dist

from specforge import launch
from tests.parity.forked import run_ranks
from tests.parity.sglang_worker import compare


def work(target: Path, tp_size: int) -> None:
    _, _, result = compare(target, launch.join(tp_size))
    if dist.get_rank() == 0:
        print(json.dumps({"target": target.name, **result}), flush=True)
    dist.barrier()


if __name__ == "__main__":
    for name in sys.argv[2:]:
        run_ranks(int(sys.argv[1]), partial(work, Path(name), int(sys.argv[1])))
