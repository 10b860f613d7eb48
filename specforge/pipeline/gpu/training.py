"""A training step on a device: loss and updated state against the CPU, peak memory against the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specforge.draft.step import DraftStep
from specforge.pipeline.gpu.made_up import CPU, MEMORY_SIZE, SIZE, STEPS, Size, draft_step, made_up
from specforge.pipeline.gpu.results import SHORT, Result, norm_apart, within
from specforge.records import FeatureBatch, FeatureRecord, Ranks, TargetHead, TargetInfo, sent

if TYPE_CHECKING:
    from specforge.train.optimizer import DraftOptimizer
    from specforge.train.plain import PlainOptimizer

RATES = {"lr": 1e-2, "adam_lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.0}


def optimizer_config(dtype: torch.dtype) -> dict[str, Any]:
    """As ds_config.json, filled: Muon, ZeRO 2."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 2, "contiguous_gradients": True, "overlap_comm": False},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "optimizer": {"type": "Muon", "params": dict(RATES)},
        "steps_per_print": 1_000_000_000,
    }


def make_optimizer(kind: str, step: DraftStep, dtype: torch.dtype, ranks: Ranks) -> DraftOptimizer | PlainOptimizer:
    """`kind`: DeepSpeed or plain."""
    if kind == "plain":
        from specforge.train.plain import PlainOptimizer

        return PlainOptimizer(step, optimizer_config(dtype), ranks)
    import deepspeed  # noqa: F401  whether it is there

    from specforge.train.optimizer import DraftOptimizer

    return DraftOptimizer(step, optimizer_config(dtype), ranks)


def train_once(
    step: DraftStep, optimizer: DraftOptimizer | PlainOptimizer, batch: FeatureBatch, device: torch.device
) -> float:
    """One optimizer step as the training loop does it; all ranks with the same row. Returns the loss of this rank."""
    import torch.distributed as dist

    denominator = sent(step.loss_rows(batch), device)
    dist.all_reduce(denominator)
    (result,) = optimizer.accumulate([batch], denominator)
    done = optimizer.update(1.0, torch.stack([result.loss.detach().double()]), limit=float("inf"))
    assert done.applied
    return done.sums[0]


# Against fp32 on a CPU. fp32 against fp64 there: 1e-7 of the loss, 1e-5 of the moments (the clipped norm), 3e-4 of the
# update (AdamW's first is the sign of each gradient); a learning rate that is off by 1 % is 1e-2 of the update. bf16:
# up to 1e-5 of the loss and 1.6 % of the moments; the update is not compared, since Newton-Schulz enlarges the noise.
STEP_BOUNDS = {
    torch.float32: {"loss": 1e-5, "moments": 1e-4, "update": 3e-3},
    torch.bfloat16: {"loss": 1e-3, "moments": 5e-2},
}


def training_step(kind: str, dtype: torch.dtype, ranks: Ranks, size: Size = SIZE) -> Result:
    """Loss and updated state of one step on the device, against the same on the CPU in fp32, written out plainly."""
    head, kept_D, records = made_up(size)
    want_loss, start, want = _reference_step(size, head, kept_D, records)
    step = draft_step(size, head, kept_D, ranks.device, dtype)
    optimizer = make_optimizer(kind, step, dtype, ranks)
    batch = FeatureBatch.pack(records, ranks.device, dtype)
    loss = train_once(step, optimizer, batch, ranks.device) * ranks.world
    state = optimizer.state()  # empty on ranks that keep none of it
    of_weights = [norm_apart(state[n] - start[n], want[n] - start[n]) for n in start if n in state]
    of_moments = [norm_apart(state[n], want[n]) for n in want if n not in start and n in state]
    found = {"loss": abs(loss / want_loss - 1), "moments": max([0.0, *of_moments])}
    if "update" in STEP_BOUNDS[dtype]:
        found["update"] = max([0.0, *of_weights])
    return within(f"training step, {kind}, {SHORT[dtype]}", found, STEP_BOUNDS[dtype])


def _reference_step(
    size: Size, head: TargetHead, kept_D: Tensor, records: Sequence[FeatureRecord]
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """(loss, weights before, weights and moments after) on the CPU in fp32, of one rank alone."""
    from specforge.train import optimizer as optimizers

    config = optimizer_config(torch.float32)
    step = draft_step(size, head, kept_D, CPU, torch.float32)
    named = dict(step.draft.named_parameters())
    start = {name: weight.detach().clone() for name, weight in named.items()}
    batch = FeatureBatch.pack(records, CPU, torch.float32)
    loss = step(batch, step.loss_rows(batch)).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(named.values(), config["gradient_clipping"])
    optimizer = optimizers.make_optimizer(list(named.items()), config, CPU)
    optimizers.set_rates(optimizer, 1.0)
    optimizer.step()
    after = {name: weight.detach() for name, weight in named.items()}
    for name, weight in named.items():
        kinds = optimizers.moments(name, weight.shape, config)
        after |= {f"{kind}.{name}": optimizer.state[weight][kind] for kind in kinds}
    return loss.item(), start, after


# Measured by planned. What the allocator rounds up and the libraries' workspaces are a few per cent of these sizes; a
# plan that leaves out one kind of tensor of a step is off by 15 % and more.
MEMORY_LEAST, MEMORY_MOST = 0.8, 1.1
NOT_THERE = {  # lines of the plan without the optimizer
    "memory, optimizer",
    "memory, gradient bucket",
    "memory, optimizer step",
}
ROWS = "memory, packed rows"  # the check's row is there before it measures


def memory(kind: str, ranks: Ranks, size: Size = MEMORY_SIZE, peak: Callable[..., int] | None = None) -> Result:
    """Peak memory of a step in bf16 against `plan`. `kind`: DeepSpeed, or "none": forward and backward alone.
    `peak(make)` calls make(), then what this returned, and gives the most bytes that both took at once."""
    head, kept_D, records = made_up(size, ranks.device)
    batch = FeatureBatch.pack(records, ranks.device, torch.bfloat16)
    del records

    def make() -> Callable[[], object]:
        step = draft_step(size, head, kept_D, ranks.device, torch.bfloat16)
        if kind != "none":
            optimizer = make_optimizer(kind, step, torch.bfloat16, ranks)
            return lambda: train_once(step, optimizer, batch, ranks.device)
        step.draft.to(torch.bfloat16)
        return lambda: step(batch, step.loss_rows(batch)).loss.backward()

    planned = planned_bytes(size, ranks.world)
    wanted = sum(size for name, size in planned.items() if name != ROWS and not (kind == "none" and name in NOT_THERE))
    measured = (peak or (lambda made: peak_bytes(made, ranks.device)))(make)
    ratio = measured / wanted
    return Result(
        what="peak memory, " + ("forward and backward" if kind == "none" else f"training step, {kind}"),
        found=f"{measured / 1e9:.2f} GB, planned {wanted / 1e9:.2f} GB: {ratio:.2f}",
        bound=f"{MEMORY_LEAST} to {MEMORY_MOST}",
        passed=MEMORY_LEAST <= ratio <= MEMORY_MOST,
    )


def peak_bytes(make: Callable[[], Callable[[], object]], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    work = make()
    work()  # gradients stay, as between the rows of a step; libraries take their workspaces
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def planned_bytes(size: Size, world: int) -> dict[str, float]:
    """`plan`'s lines for the draft, by name."""
    from specforge.config import PlanSettings
    from specforge.pipeline import planning

    config, tokens = size.config, sum(size.lengths)
    names = "intermediate_size num_attention_heads num_key_value_heads head_dim rms_norm_eps max_position_embeddings"
    info = TargetInfo(
        path="",
        fingerprint="",
        config={name: getattr(config, name) for name in names.split()} | {"rope_parameters": config.rope_parameters},
        hidden_size=config.hidden_size,
        num_layers=32,
        vocab_size=config.vocab_size,
        dtype=torch.bfloat16,
    )
    settings = PlanSettings(
        model_path="", dp_size=world, draft_vocab_size=config.draft_vocab_size, row_tokens=tokens, steps=STEPS
    )
    return {figure.what: figure.value for figure in planning.draft_figures(settings, info, max(size.lengths))}
