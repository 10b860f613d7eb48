"""DeepSpeed around the draft step: precision, ZeRO, clipping, AdamW. Its state as plain named tensors.

Checkpoints hold the fp32 weights and moments whole, by parameter name, in safetensors: they restore bit for bit on the
same ranks, load on any other number of ranks without conversion, and hold no pickle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge.config import TrainSettings
from specforge.draft.step import StepResult
from specforge.errors import ConfigError
from specforge.records import FeatureBatch, Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_config(settings: TrainSettings, ranks: Ranks) -> dict[str, Any]:
    """ds_config.json with its "auto" filled by the run's settings. A number there that contradicts them is an error."""
    path = settings.deepspeed_config
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        parts = [config, *(config.get(key, {}) for key in ("zero_optimization", "bf16", "fp16", "optimizer"))]
        parts.append(config.get("optimizer", {}).get("params", {}))
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("it or one of its parts is no mapping")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"the DeepSpeed settings cannot be read: {error}",
            where=f"--deepspeed-config {path}",
            fix="give a JSON file; the project's ds_config.json is a good start",
        ) from error
    stage = config.get("zero_optimization", {}).get("stage", 0)
    bf16 = config.get("bf16", {}).get("enabled", False)
    if stage not in (0, 1, 2, 3) or config.get("fp16", {}).get("enabled") or (bf16 and stage == 0):
        raise ConfigError(
            "unsupported precision and ZeRO stage: fp32 takes 0 to 3, bf16 needs 1, 2 or 3 (stage 0 loses small "
            "updates); fp16 is not supported",
            where=f"{path}, 'bf16' and 'zero_optimization'",
            fix='set "bf16": {"enabled": true} and "zero_optimization": {"stage": 2}',
        )
    kind = config.get("optimizer", {}).get("type", "AdamW")
    if kind not in ("Adam", "AdamW"):
        raise ConfigError(
            f"the optimizer {kind} has no state that a checkpoint here knows",
            where=f"{path}, 'type'",
            fix='use "AdamW"',
        )
    if config.get("optimizer", {}).get("params", {}).get("torch_adam", True) is not True:
        raise ConfigError(
            "DeepSpeed's own Adam counts its steps where checkpoints do not find them",
            where=f"{path}, 'torch_adam'",
            fix="leave it out, or set it to true: torch's AdamW",
        )
    if bf16 and stage == 1 and config.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        raise ConfigError(
            "ZeRO stage 1 in bf16 with fp32 accumulation keeps its state where checkpoints do not find it",
            where=f"{path}, 'grad_accum_dtype'",
            fix="use stage 2",
        )
    if "scheduler" in config:
        raise ConfigError(
            "the learning rate's course is the run's, not DeepSpeed's",
            where=f"{path}, 'scheduler'",
            fix="remove it there; use --lr and --warmup-share",
        )
    if settings.rows_per_step % ranks.world:
        raise ConfigError(
            f"{settings.rows_per_step} packed rows in a step cannot be shared by {ranks.world} ranks",
            where="--rows-per-step",
            fix=f"use a multiple of {ranks.world}",
        )
    decided = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": settings.rows_per_step // ranks.world,
        "gradient_clipping": settings.max_grad_norm,
    }
    if "train_batch_size" in config:
        decided["train_batch_size"] = settings.rows_per_step
    optimizer = config.setdefault("optimizer", {"type": "AdamW", "params": {}})
    parameters = optimizer.setdefault("params", {})
    for place, key, value in [(config, k, v) for k, v in decided.items()] + [(parameters, "lr", settings.lr)]:
        if place.get(key, "auto") not in ("auto", value):
            raise ConfigError(
                f"{key} is {place[key]} there, and {value} by the run's settings",
                where=f"{path}, '{key}'",
                fix='write "auto" there and use the flag (--rows-per-step, --max-grad-norm, --lr)',
            )
        place[key] = value
    left = next(_autos(config), None)
    if left:
        raise ConfigError(
            f'"auto" stands at {left}, which this run does not decide', where=f"{path}, '{left}'", fix="write a value"
        )
    parameters["torch_adam"] = True
    return dict(config)


def _autos(config: dict[str, Any]) -> Iterator[str]:
    """The keys that still say "auto"."""
    for key, value in config.items():
        if value == "auto":
            yield key
        elif isinstance(value, dict):
            yield from _autos(value)


def learning_rate(step: int, total: int, peak: float, warmup_share: float, schedule: str = "cosine") -> float:
    """Linear rise over the first share of the steps, then half a cosine to zero, or constant. `step` counts from 0."""
    warmup = max(1, round(total * warmup_share))
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What came of an optimizer step."""

    sums: list[float]  # as given, read
    norm: float  # of the gradient, before clipping
    applied: bool


def read(sums: Tensor, norm: Tensor | float, limit: float) -> Update:
    *values, length = torch.cat([sums, torch.as_tensor(norm, dtype=sums.dtype, device=sums.device)[None]]).tolist()
    return Update(sums=values, norm=length, applied=all(map(math.isfinite, (*values, length))) and length <= limit)


class DraftOptimizer:
    """The draft step in a DeepSpeed engine; data-parallel over all ranks."""

    def __init__(self, module: nn.Module, config: dict[str, Any], ranks: Ranks) -> None:
        import deepspeed

        if ranks.device.type == "cpu":  # a shared-memory all-reduce that takes minutes to compile; gloo does without
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        parameters = [p for p in module.parameters() if p.requires_grad]
        self._stage = int(config.get("zero_optimization", {}).get("stage", 0))
        if self._stage == 3:  # gathered at once: module by module, ranks with other numbers of rows wait for ever
            deepspeed.utils.set_z3_leaf_modules(module, [type(module)])
        self._engine, *_ = deepspeed.initialize(
            model=module, model_parameters=parameters, dist_init_required=False, config=config
        )
        self._world = ranks.world
        self._rank, self._device = ranks.rank, ranks.device
        self.module = module
        outer = self._engine.optimizer
        if hasattr(outer, "check_grad_overflow"):
            outer.check_grad_overflow = True  # in fp32 too
        adam = outer.optimizer if hasattr(outer, "optimizer") else outer
        adam.step = partial(self._step_if_sound, adam.step)

    def accumulate(self, batches: Sequence[FeatureBatch | None], normaliser: Tensor) -> list[StepResult]:
        """Forward and backward of this rank's packed rows of one optimizer step. The gradient is the sum over ranks and
        rows, as the normaliser expects: DeepSpeed's division by accumulation is off and its mean over ranks undone."""
        results = []
        for left, batch in zip(reversed(range(len(batches))), batches, strict=True):
            result = self._engine(batch, normaliser, self._anchor())
            self._engine.backward(result.loss * self._world, scale_wrt_gas=False)
            results.append(result)
            if left:
                self._engine.step()  # counts the rows; updates after the last one only
        return results

    def _anchor(self) -> Tensor | None:
        """Stage 3 reduces a leaf's gradients when that of its input is made; without one, before they are made."""
        return torch.zeros((), device=self._device, requires_grad=True) if self._stage == 3 else None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The weights are whole on every rank inside, to be read."""
        if self._stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter for _, parameter in self._named()]):
            yield

    def update(self, rate: float, sums: Tensor, limit: float) -> Update:
        """The update with what was accumulated; nothing changes where one of `sums` is not finite, or the gradient is
        not finite or longer than `limit`. `sums`, on the device, are read with the gradient's norm: the one time in a
        step that the host waits for the device."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._sums, self._limit = sums, limit
        self._done: Update | None = None
        if not self._stage:  # before it is clipped; the others know their norm, and keep none where it is not finite
            gradients = [p.grad for _, p in self._named() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)
        self._engine.step()
        return self._done or read(sums, math.inf, limit)

    def _step_if_sound(self, step: Callable[[], Any]) -> None:
        """In the place of AdamW's own step, so that no moment takes in what is skipped."""
        if self._done is None:  # stage 3 steps once for each part of its parameters
            norm = self._engine.optimizer._global_grad_norm if self._stage else self._norm
            self._done = read(self._sums, norm, self._limit)
        if self._done.applied:
            step()

    def state(self) -> dict[str, Tensor]:
        """fp32 weights by name, and `exp_avg.NAME`, `exp_avg_sq.NAME`; whole, on the CPU. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found: dict[str, Tensor] = {}
        for name, parameter in self._named():
            if self._stage:
                values = [safe_get_full_fp32_param(parameter)]
                values += [safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS]
            else:
                moments = self._engine.optimizer.state[parameter]
                values = [parameter.detach(), *(moments[moment] for moment in MOMENTS)]
            for prefix, value in zip(("", *(f"{moment}." for moment in MOMENTS)), values, strict=True):
                found[prefix + name] = value.to("cpu", torch.float32).clone()
        return found

    def load_state(self, state: dict[str, Tensor], updates: int) -> None:
        """The inverse of `state`, after `updates` optimizer steps. Every rank passes the same tensors."""
        self._make_moments(updates)
        for name, parameter in self._named():
            values = {"": state[name], **{moment: state[f"{moment}.{name}"] for moment in MOMENTS}}
            if self._stage:
                self._load_whole(parameter, values)
            else:
                parameter.data.copy_(values[""])
                for moment in MOMENTS:
                    self._engine.optimizer.state[parameter][moment].copy_(values[moment])

    def _make_moments(self, updates: int) -> None:
        """AdamW makes its state at the first step: make it now, so that it can be filled."""
        outer = self._engine.optimizer
        flats = [parameter for _, parameter in self._named()]
        if self._stage:
            flats = outer.fp32_partitioned_groups_flat if self._stage == 3 else outer.single_partition_of_fp32_groups
        adam = getattr(outer, "optimizer", outer)
        for flat in flats:
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            adam.state[flat] = {"step": torch.tensor(float(updates)), **moments}
        if self._stage in (1, 2):
            outer._lazy_init_hp_params_optimizer_state()

    def _load_whole(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        if self._stage == 3:
            self._load_partition(parameter, values)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter.data.copy_(values[""])
        safe_set_full_fp32_param(parameter, values[""].to(parameter.device))
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, values[moment].to(parameter.device), moment)

    def _load_partition(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        """Of stage 3: this rank's equal part of each, the last one filled up."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(values[""])
        outer = self._engine.optimizer
        for name, value in values.items():
            part, _ = outer._get_fp32_opt_state_partition(parameter, False, optim_state_key=name or None)
            filled = F.pad(value.flatten(), (0, part.numel() * self._world - value.numel()))
            part.data.copy_(filled[part.numel() * self._rank :][: part.numel()])

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name.removeprefix("draft."), p) for name, p in self.module.named_parameters()]
