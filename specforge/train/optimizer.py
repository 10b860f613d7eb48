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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge.config import TrainSettings
from specforge.draft.step import StepResult
from specforge.errors import ConfigError
from specforge.files import read_json
from specforge.hardware import compute_dtype
from specforge.records import FeatureBatch, Ranks
from specforge.train.muon import Muon, Partition, is_muon
from specforge.train.recipe import Recipe

NAMES = {"muon": "Muon", "adamw": "AdamW"}  # --optimizer, and what ds_config.json calls it
PARAMETERS = ("betas", "eps", "weight_decay")


def make_optimizer(
    named: Sequence[tuple[str, nn.Parameter | Tensor]], config: dict[str, Any], device: torch.device
) -> Muon:
    """The optimizer that the filled DeepSpeed `config` describes, over these parameters. Each group has its peak
    learning rate as `peak`."""
    given = config["optimizer"]["params"]
    groups = [{"params": [p for _, p in named], "peak": given["lr"]}]
    if config["optimizer"]["type"] == NAMES["muon"]:
        groups = [
            {"params": [p for name, p in named if is_muon(name, p.shape)], "peak": given["lr"], "muon": True},
            {"params": [p for name, p in named if not is_muon(name, p.shape)], "peak": given["adam_lr"]},
        ]
    adam = {name: given[name] for name in PARAMETERS if name in given}
    return Muon(groups, compute_dtype(training_dtype(config), device), device, **adam)


def training_dtype(config: dict[str, Any]) -> torch.dtype:
    """Of weights and activations, by the filled DeepSpeed `config`."""
    return torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32


def moments(name: str, shape: torch.Size, config: dict[str, Any]) -> tuple[str, ...]:
    """The names of the optimizer's state for a parameter."""
    muon = config["optimizer"]["type"] == NAMES["muon"] and is_muon(name, shape)
    return ("momentum_buffer",) if muon else ("exp_avg", "exp_avg_sq")


def set_rates(optimizer: Any, share: float) -> None:
    """Each group's learning rate: this share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak"]


def deepspeed_config(settings: TrainSettings, recipe: Recipe, ranks: Ranks, training: torch.dtype) -> dict[str, Any]:
    """ds_config.json with its "auto" filled by the run's settings and recipe, and by the dtype `training`. A value
    there that contradicts settings or recipe is an error."""
    path = settings.deepspeed_config
    try:
        config = read_json(path)
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
    if bf16 == "auto":
        bf16 = config["bf16"]["enabled"] = training == torch.bfloat16
    if stage not in (0, 1, 2, 3) or config.get("fp16", {}).get("enabled") or (bf16 and stage == 0):
        raise ConfigError(
            "unsupported precision and ZeRO stage: fp32 takes 0 to 3, bf16 needs 1, 2 or 3 (stage 0 loses small "
            "updates); fp16 is not supported",
            where=f"{path}, 'bf16' and 'zero_optimization'",
            fix='set "bf16": {"enabled": "auto"} and "zero_optimization": {"stage": 2}',
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
    if recipe.batch_size % ranks.world:
        raise ConfigError(
            f"{recipe.batch_size} packed rows in a step cannot be shared by {ranks.world} ranks",
            where="--batch-size",
            fix=f"use a multiple of {ranks.world}",
        )
    decided = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": recipe.batch_size // ranks.world,
        "gradient_clipping": settings.max_grad_norm,
    }
    if "train_batch_size" in config:
        decided["train_batch_size"] = recipe.batch_size
    optimizer = config.setdefault("optimizer", {})
    optimizer.setdefault("type", "auto")
    parameters = optimizer.setdefault("params", {})
    _refuse_unknown(parameters, path)
    wanted: list[tuple[dict[str, Any], str, Any, str]] = [
        (config, key, value, "--batch-size, --max-grad-norm") for key, value in decided.items()
    ]
    wanted += [(optimizer, "type", NAMES[recipe.optimizer], "--optimizer")]
    wanted += [(parameters, "lr", recipe.lr, "--lr"), (parameters, "adam_lr", recipe.adam_lr, "--adam-lr")]
    for place, key, value, flag in wanted:
        given = place.get(key, "auto")
        if given != "auto" and str(given).lower() != str(value).lower():
            raise ConfigError(
                f"{key} is {given} there, and {value} by the run's settings",
                where=f"{path}, '{key}'",
                fix=f'write "auto" there and use the flag ({flag})',
            )
        place[key] = value
    left = next(_autos(config), None)
    if left:
        raise ConfigError(
            f'"auto" stands at {left}, which this run does not decide', where=f"{path}, '{left}'", fix="write a value"
        )
    return dict(config)


def _refuse_unknown(parameters: dict[str, Any], path: Path) -> None:
    for key, value in parameters.items():
        if key in ("lr", "adam_lr", *PARAMETERS) or (key == "torch_adam" and value is True):
            continue
        raise ConfigError(
            f"the optimizer has no parameter {key}: {json.dumps(value)}",
            where=f"{path}, 'optimizer', '{key}'",
            fix=f"remove it; known are lr, adam_lr, {', '.join(PARAMETERS)}",
        )


def _autos(config: dict[str, Any]) -> Iterator[str]:
    """The keys that still say "auto"."""
    for key, value in config.items():
        if value == "auto":
            yield key
        elif isinstance(value, dict):
            yield from _autos(value)


def share_of_peak(step: int, total: int, warmup_share: float, schedule: str = "cosine") -> float:
    """The learning rate as a share of its peak: a linear rise over the first share of the steps, then half a cosine to
    zero, or constant. `step` counts from 0."""
    warmup = max(1, round(total * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * done))


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
        self._stage = int(config.get("zero_optimization", {}).get("stage", 0))
        if self._stage == 3:  # gathered at once: module by module, ranks with other numbers of rows wait for ever
            deepspeed.utils.set_z3_leaf_modules(module, [type(module)])
        self._config, self._ranks, self.module = config, ranks, module
        of_deepspeed = {key: value for key, value in config.items() if key != "optimizer"}
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(self._named(), config, ranks.device),
            dist_init_required=False,
            config=of_deepspeed | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False},
        )
        outer = self._engine.optimizer
        self._name_partitions()
        self._make_moments()
        if hasattr(outer, "check_grad_overflow"):
            outer.check_grad_overflow = True  # in fp32 too
        self._base.step = partial(self._step_if_sound, self._base.step)

    def _name_partitions(self) -> None:
        """Tells Muon which matrices ZeRO's flat tensors hold."""
        place = {"rank": self._ranks.rank, "world": self._ranks.world}
        for flat, group in self._flats() if self._stage else ():
            shapes: list[Any] = [(getattr(p, "ds_shape", p.shape),) for p in group]
            runs, parts = shapes, [-(-math.prod(shape) // self._ranks.world) for (shape,) in shapes]
            if self._stage < 3:
                runs, parts = [tuple(p.shape for p in group)], [len(flat)]
            self._base.partitions[flat] = Partition(runs=tuple(runs), parts=tuple(parts), **place)

    def accumulate(self, batches: Sequence[FeatureBatch | None], normaliser: Tensor) -> list[StepResult]:
        """Forward and backward of this rank's packed rows of one optimizer step. The gradient is the sum over ranks and
        rows, as the normaliser expects: DeepSpeed's division by accumulation is off and its mean over ranks undone."""
        results = []
        for left, batch in zip(reversed(range(len(batches))), batches, strict=True):
            result = self._engine(batch, normaliser, self._anchor())
            self._engine.backward(result.loss * self._ranks.world, scale_wrt_gas=False)
            results.append(result)
            if left:
                self._engine.step()  # counts the rows; updates after the last one only
        return results

    def _anchor(self) -> Tensor | None:
        """Stage 3 reduces a leaf's gradients when that of its input is made; without one, before they are made."""
        return torch.zeros((), device=self._ranks.device, requires_grad=True) if self._stage == 3 else None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The weights are whole on every rank inside, to be read."""
        if self._stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter for _, parameter in self._named()]):
            yield

    def update(self, share: float, sums: Tensor, limit: float) -> Update:
        """The update with what was accumulated, at this share of the peak learning rates; nothing changes where one of
        `sums` is not finite, or the gradient is not finite or longer than `limit`. `sums`, on the device, are read with
        the gradient's norm: the one time in a step that the host waits for the device."""
        set_rates(self._engine.optimizer, share)
        self._sums, self._limit = sums, limit
        self._done: Update | None = None
        if not self._stage:  # before it is clipped; the others know their norm, and keep none where it is not finite
            gradients = [p.grad for _, p in self._named() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)
        self._engine.step()
        return self._done or read(sums, math.inf, limit)

    def _step_if_sound(self, step: Callable[[], Any]) -> None:
        """In place of the optimizer's own step, so that no moment takes in what is skipped."""
        if self._done is None:  # stage 3 steps once for each part of its parameters
            norm = self._engine.optimizer._global_grad_norm if self._stage else self._norm
            self._done = read(self._sums, norm, self._limit)
        if self._done.applied:
            step()

    def state(self) -> dict[str, Tensor]:
        """On rank 0 the fp32 weights by name, and their moments as MOMENT.NAME; whole, on the CPU. Nothing on the other
        ranks. Collective."""
        found: dict[str, Tensor] = {}
        for name, parameter in self._named():
            for kind in ("", *self._moments(name, parameter)):
                value = self._whole(parameter, kind)
                if self._ranks.rank == 0:
                    found[f"{kind}.{name}" if kind else name] = value.to("cpu", torch.float32).clone()
        return found

    def _whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """The weight in fp32, or with `kind` that moment. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        value: Tensor
        if not self._stage:
            value = self._engine.optimizer.state[parameter][kind] if kind else parameter.detach()
        else:
            value = safe_get_full_optimizer_state(parameter, kind) if kind else safe_get_full_fp32_param(parameter)
        return value

    def load_state(self, state: dict[str, Tensor], updates: int) -> None:
        """The inverse of `state`, after `updates` optimizer steps. Every rank passes the same tensors."""
        for of_flat in self._base.state.values():
            if "step" in of_flat:
                of_flat["step"].fill_(updates)
        for name, parameter in self._named():
            kinds = self._moments(name, parameter)
            values = {"": state[name], **{kind: state[f"{kind}.{name}"] for kind in kinds}}
            if self._stage:
                self._load_whole(parameter, values)
            else:
                parameter.data.copy_(values[""])
                for kind in kinds:
                    self._engine.optimizer.state[parameter][kind].copy_(values[kind])

    def _make_moments(self) -> None:
        """The optimizer would make its state at its first step, and ZeRO 1 and 2 would link it to the parameters after
        the first of its groups, so before the others have any."""
        outer = self._engine.optimizer
        names = {parameter: name for name, parameter in self._named()}
        for flat, group in self._flats():
            kinds = self._moments(names[group[0]], group[0])
            self._base.state[flat] = {kind: torch.zeros_like(flat) for kind in kinds}
            if "exp_avg" in kinds:
                self._base.state[flat]["step"] = torch.tensor(0.0)
        if self._stage in (1, 2):
            outer._lazy_init_hp_params_optimizer_state()

    def _flats(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """The tensors that the optimizer steps, each with the parameters whose parts it holds."""
        outer = self._engine.optimizer
        if self._stage == 3:
            return list(zip(outer.fp32_partitioned_groups_flat, outer.fp16_groups, strict=True))
        if self._stage:
            return list(zip(outer.single_partition_of_fp32_groups, outer.round_robin_bit16_groups, strict=True))
        return [(parameter, [parameter]) for _, parameter in self._named()]

    @property
    def _base(self) -> Any:
        """The optimizer inside ZeRO's."""
        outer = self._engine.optimizer
        return outer.optimizer if self._stage else outer

    def _moments(self, name: str, parameter: nn.Parameter) -> tuple[str, ...]:
        return moments(name, getattr(parameter, "ds_shape", parameter.shape), self._config)

    def _load_whole(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        if self._stage == 3:
            self._load_partition(parameter, values)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter.data.copy_(values[""])
        safe_set_full_fp32_param(parameter, values[""].to(parameter.device))
        for kind in values.keys() - {""}:
            safe_set_full_optimizer_state(parameter, values[kind].to(parameter.device), kind)

    def _load_partition(self, parameter: nn.Parameter, values: dict[str, Tensor]) -> None:
        """Of stage 3: this rank's equal part of each, the last one filled up."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(values[""])
        outer = self._engine.optimizer
        for name, value in values.items():
            part, _ = outer._get_fp32_opt_state_partition(parameter, False, optim_state_key=name or None)
            filled = F.pad(value.flatten(), (0, part.numel() * self._ranks.world - value.numel()))
            part.data.copy_(filled[part.numel() * self._ranks.rank :][: part.numel()])

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name.removeprefix("draft."), p) for name, p in self.module.named_parameters()]
