"""What optimizer.py does with DeepSpeed, in plain torch: the same numbers, for comparison and where DeepSpeed is not to
be had. Nothing is partitioned: every rank holds the fp32 weights and moments."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from specforge.draft.step import DraftStep, StepResult
from specforge.records import FeatureBatch, Ranks
from specforge.train.optimizer import MOMENTS, Update, read


class PlainOptimizer:
    """torch's AdamW over fp32 copies of the weights. `config` is DeepSpeed's (ds_config.json, filled)."""

    def __init__(self, module: DraftStep, config: dict[str, Any], ranks: Ranks) -> None:
        self.module = module
        dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
        self._clip = float(config["gradient_clipping"])
        self._weights = {name: p.detach().float().clone() for name, p in module.draft.named_parameters()}
        given = config["optimizer"]["params"]
        known = {name: given[name] for name in ("lr", "betas", "eps", "weight_decay") if name in given}
        self._adam = torch.optim.AdamW(list(self._weights.values()), **known)
        module.draft.to(dtype)

    def accumulate(self, batches: Sequence[FeatureBatch | None], normaliser: Tensor) -> list[StepResult]:
        """As DraftOptimizer.accumulate; gradients are summed in fp32."""
        for weight in self._weights.values():
            weight.grad = torch.zeros_like(weight)
        results = []
        for batch in batches:
            results.append(self.module(batch, normaliser))
            results[-1].loss.backward()
            for name, parameter in self.module.draft.named_parameters():
                if parameter.grad is not None:
                    self._weights[name].grad.add_(parameter.grad)  # type: ignore[union-attr]
                parameter.grad = None
        for weight in self._weights.values():
            dist.all_reduce(weight.grad)
        return results

    def whole(self) -> AbstractContextManager[None]:
        """As DraftOptimizer.whole."""
        return nullcontext()

    def update(self, rate: float, sums: Tensor, limit: float) -> Update:
        """As DraftOptimizer.update."""
        for group in self._adam.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(list(self._weights.values()), self._clip)
        done = read(sums, norm, limit)
        if done.applied:
            self._adam.step()
            self._write_back()
        return done

    def _write_back(self) -> None:
        with torch.no_grad():
            for name, parameter in self.module.draft.named_parameters():
                parameter.copy_(self._weights[name])

    def state(self) -> dict[str, Tensor]:
        """As DraftOptimizer.state."""
        found = dict(self._weights)
        for name, weight in self._weights.items():
            moments = self._adam.state.get(weight) or {moment: torch.zeros_like(weight) for moment in MOMENTS}
            found |= {f"{moment}.{name}": moments[moment] for moment in MOMENTS}
        return {name: value.detach().to("cpu").clone() for name, value in found.items()}

    def load_state(self, state: dict[str, Tensor], updates: int) -> None:
        """As DraftOptimizer.load_state."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(state[name])
                moments = {moment: state[f"{moment}.{name}"].to(weight.device).clone() for moment in MOMENTS}
                self._adam.state[weight] = {"step": torch.tensor(float(updates)), **moments}
        self._write_back()
