"""Run by test_ranks.py: two optimizer steps over three packed rows: with two ranks, one has none in the last;
then the optimizer's whole state goes to a file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from specforge import launch
from specforge.draft.step import DraftStep
from specforge.features.packing import share_out
from specforge.records import FeatureBatch
from specforge.train.optimizer import DraftOptimizer
from tests.unit.test_draft_step import DECAY, STEPS, make


def main() -> None:
    output, stage, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    ranks = launch.join(1)
    assert ranks.world == world
    draft, head, kept, _, records = make(0.8, torch.float32)
    step = DraftStep(draft, head, kept, STEPS, DECAY)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2 // world,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "torch_adam": True}},
    }
    optimizer = DraftOptimizer(step, config, ranks)
    for slots in share_out([[1], [2], [4]], 2, world):  # the last optimizer step has one row
        rows = [slot[ranks.rank] for slot in slots]
        device = torch.device("cpu")
        batches = [FeatureBatch.pack([records[at] for at in r], device, torch.float32) if r else None for r in rows]
        normaliser = torch.stack([step.loss_rows(batch) if batch else step.no_rows() for batch in batches]).sum(0)
        dist.all_reduce(normaliser)
        for batch in batches:
            optimizer.accumulate(batch, normaliser)
    state = optimizer.state()
    if ranks.rank == 0:
        save_file(state, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
