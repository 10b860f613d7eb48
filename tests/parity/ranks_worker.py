"""Run by test_ranks.py: optimizer steps over four packed rows and over one in turn, so that with several ranks all but
one have none in every second. Then the optimizer's whole state and the losses go to a file.

    ranks_worker.py OUTPUT OPTIMIZER KIND DTYPE WORLD FIRST LAST [STATE]

OPTIMIZER is Muon or AdamW. KIND is plain, or DeepSpeed's ZeRO stage, with an "o" behind it where it is offloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from specforge import launch
from specforge.draft.step import DraftStep
from specforge.features.packing import share_out
from specforge.records import FeatureBatch
from specforge.train.optimizer import DraftOptimizer
from specforge.train.plain import PlainOptimizer
from tests.unit.test_draft_step import DECAY, STEPS, make

RATES = {"Muon": 1e-2, "AdamW": 1e-3}
ROWS, SKIPPED = 4, (5, 7)


def main() -> None:
    output, name, kind, dtype_name, world = Path(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5])
    dtype = getattr(torch, dtype_name)
    ranks = launch.join(1)
    assert ranks.world == world
    draft, head, kept, _, records = make(0.8, torch.float32)
    head = type(head)(embedding_VH=head.embedding_VH.to(dtype), head_VH=head.head_VH.to(dtype))
    step = DraftStep(draft.to(ranks.device), head.to(ranks.device), kept.to(ranks.device), STEPS, DECAY)
    zero: dict[str, object] = {"stage": 0 if kind == "plain" else int(kind[0])}
    if kind in ("2o", "3o"):
        zero["offload_optimizer"] = {"device": "cpu"}
    if kind == "3o":
        zero["offload_param"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ROWS // world,
        "gradient_clipping": 0.5,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "optimizer": {"type": name, "params": {"lr": RATES[name], "adam_lr": RATES["AdamW"], "betas": [0.9, 0.95]}},
        "steps_per_print": 1000000,
    }
    optimizer = (PlainOptimizer if kind == "plain" else DraftOptimizer)(step, config, ranks)
    first, last = int(sys.argv[6]), int(sys.argv[7])
    if first:
        state = {name: tensor for name, tensor in load_file(sys.argv[8]).items() if name != "losses"}
        optimizer.load_state(state, first - sum(update < first for update in SKIPPED))
    losses = []
    slots = share_out([[1], [2], [4], [1], [2]], ROWS, world)
    for update in range(first, last):
        rows = [slot[ranks.rank] for slot in slots[update % 2]]
        batches = [FeatureBatch.pack([records[at] for at in r], ranks.device, dtype) if r else None for r in rows]
        normaliser = torch.stack([step.loss_rows(batch) if batch else step.no_rows() for batch in batches]).sum(0)
        normaliser = normaliser.to(ranks.device)
        dist.all_reduce(normaliser)
        loss = sum(result.loss.detach().double() for result in optimizer.accumulate(batches, normaliser))
        dist.all_reduce(loss)
        losses.append(loss)
        # What is skipped leaves no trace, whoever skips it.
        sums = torch.tensor([float("nan") if update == SKIPPED[0] else 1.0], device=ranks.device)
        done = optimizer.update(1.0, sums, limit=1e-9 if update == SKIPPED[1] else 1e9)
        assert done.applied == (update not in SKIPPED), (update, done)
    state = optimizer.state()
    assert bool(state) == (ranks.rank == 0), "only the rank that writes has the memory for it"
    if ranks.rank == 0:
        save_file(state | {"losses": torch.stack(losses)}, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
