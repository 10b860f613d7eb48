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
from specforge.train.optimizer import Update, make_optimizer, moments, read, set_rates, training_dtype


class PlainOptimizer:
    """Muon or AdamW over fp32 copies of the weights. `config` is DeepSpeed's (ds_config.json, filled)."""

    def __init__(self, module: DraftStep, config: dict[str, Any], ranks: Ranks) -> None:
        self.module = module
        self._clip = float(config["gradient_clipping"])
        self._weights = {name: p.detach().float().clone() for name, p in module.draft.named_parameters()}
        self._config, self._rank = config, ranks.rank
        self._optimizer = make_optimizer(list(self._weights.items()), config, ranks.device)
        module.draft.to(training_dtype(config))

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

    def update(self, share: float, sums: Tensor, limit: float) -> Update:
        """As DraftOptimizer.update."""
        set_rates(self._optimizer, share)
        norm = torch.nn.utils.clip_grad_norm_(list(self._weights.values()), self._clip)
        done = read(sums, norm, limit)
        if done.applied:
            self._optimizer.step()
            self._write_back()
        return done

    def _write_back(self) -> None:
        with torch.no_grad():
            for name, parameter in self.module.draft.named_parameters():
                parameter.copy_(self._weights[name])

    def state(self) -> dict[str, Tensor]:
        """As DraftOptimizer.state."""
        if self._rank:
            return {}
        found = dict(self._weights)
        for name, weight in self._weights.items():
            of_weight = self._optimizer.state[weight]
            kinds = moments(name, weight.shape, self._config)
            found |= {f"{kind}.{name}": of_weight.get(kind, torch.zeros_like(weight)) for kind in kinds}
        return {name: value.detach().to("cpu").clone() for name, value in found.items()}

    def load_state(self, state: dict[str, Tensor], updates: int) -> None:
        """As DraftOptimizer.load_state."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(state[name])
                kinds = moments(name, weight.shape, self._config)
                of_weight = {kind: state[f"{kind}.{name}"].to(weight.device).clone() for kind in kinds}
                if "exp_avg" in kinds:
                    of_weight["step"] = torch.tensor(float(updates))
                self._optimizer.state[weight] = of_weight
        self._write_back()
