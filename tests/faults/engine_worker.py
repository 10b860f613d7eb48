"""Run by test_engine_faults.py, once a rank. Prints one JSON line."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from specforge import console, launch
from specforge.config import EngineSettings
from specforge.errors import EngineError
from specforge.features import aside
from specforge.features.passes import Passes
from specforge.pipeline.shared import watched
from specforge.records import Example, FeatureRecord
from specforge.target import engine as engines
from specforge.target import same_head, weights

LONG, SHORT, COUNT = 8000, 480, 50


def load(target: str, tp_size: int):
    ranks = launch.join(tp_size)
    settings = EngineSettings(engine="sglang", tp_size=tp_size, tokens_per_batch=LONG + SHORT * COUNT)
    return ranks, engines.load(settings, weights.describe(target), ranks)


def examples() -> list[Example]:
    random = np.random.default_rng(0)
    return [
        Example(sample_id=at, token_ids=random.integers(3, 512, n).astype(np.int32), loss_mask=np.ones(n, dtype=bool))
        for at, n in enumerate([LONG] + [SHORT] * (COUNT - 1))
    ]


def address_space() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    return int(line.split()[1]) << 10


def memory_that_runs_out(target: str) -> dict:
    """The process may take no more memory than it has, after the target is loaded: the allocator truly fails."""
    _, engine = load(target, 1)
    resource.setrlimit(resource.RLIMIT_AS, (address_space(), resource.RLIM_INFINITY))
    outcome = halved(engine)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return outcome


def one_rank_without_memory(target: str) -> dict:
    """Rank 1 fails to allocate behind the forward of a pass over 3,000 tokens; rank 0 has memory."""
    ranks, engine = load(target, 2)

    def too_much(module, args, output):
        if ranks.rank == 1 and len(args[0]) > 3000:
            torch.empty(1 << 60, dtype=torch.uint8)

    engine._runner.model.logits_processor.register_forward_hook(too_much)  # after the last collective call
    mine = halved(engine)
    both: list = [None, None]
    dist.all_gather_object(both, mine)
    assert both[0] == both[1], both
    return mine


def halved(engine) -> dict:
    passes, too_large, captured = [], [], []
    for found in Passes(engine, examples()).run(range(COUNT)):
        passes.append(len(found))
        too_large += [at for at, record in found if record == aside.TOO_LARGE]
        captured += [record.sample_id for _, record in found if isinstance(record, FeatureRecord)]
    return {"passes": passes, "set_aside": too_large, "captured": sorted(captured)}


def another_head(target: str, engine_name: str, name: str, tp_size: str) -> dict:
    """One row of the tensor `name` becomes another one in the file, after the engine has loaded it."""
    ranks = launch.join(int(tp_size))
    settings = EngineSettings(engine=engine_name, tp_size=int(tp_size))
    engine = engines.load(settings, weights.describe(target), ranks)
    dist.barrier()
    if ranks.rank == 0:
        file = Path(target) / "model.safetensors"
        tensors = load_file(file)
        row = int(same_head.sampled(len(tensors[name]))[20])
        tensors[name][row] = torch.randn_like(tensors[name][row]) * tensors[name][row].std()
        save_file(tensors, file, metadata={"format": "pt"})
    dist.barrier()
    try:
        engine.self_check()
    except EngineError as error:
        return {"said": str(error)}
    return {"said": ""}


def a_rank_that_hangs(folder: str, timeout_s: str) -> dict:
    """Rank 1 sleeps; rank 0 waits for it in a barrier."""
    console.quiet(Path(folder) / f"rank{launch.os.environ['RANK']}.log")
    ranks = launch.join(1)

    with watched(ranks, float(timeout_s)):
        if ranks.rank == 1:
            asleep()
        dist.barrier()
    return {}


def asleep() -> None:
    time.sleep(1000)


def main() -> None:
    task, *arguments = sys.argv[1:]
    result = globals()[task](*arguments)
    if dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
