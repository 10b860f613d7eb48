"""Chooses and loads the engine that runs the target."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from specforge import hardware
from specforge.config import EngineSettings, RegenerateSettings
from specforge.errors import ConfigError, EngineError, SpecforgeError, first_line, is_out_of_memory, remedy
from specforge.records import DraftJudge, Ranks, TargetEngine, TargetInfo
from specforge.target.weights import check_aux_layers, default_aux_layers

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def sglang_problem() -> str | None:
    """Why SGLang cannot be used here, or None."""
    if importlib.util.find_spec("sglang") is None:
        return "sglang is not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it lacks of CUDA
            from specforge.target.sglang import names  # noqa: F401
    except Exception as error:  # an import of SGLang's can fail in any way
        return f"sglang does not import: {type(error).__name__}: {error}"
    return None


def choose(engine: str) -> str:
    """`sglang` or `hf`. SGLang is the default wherever it imports."""
    if engine == "hf":
        return "hf"
    problem = sglang_problem()
    if problem and engine == "sglang":
        raise EngineError(problem, where="--engine sglang", fix="run `specforge doctor`")
    return "hf" if problem else "sglang"


def check_tp(info: TargetInfo, tp_size: int, engine: str = "auto") -> None:
    """Raises ConfigError where the engine has no tensor parallelism, or the target's heads cannot be shared evenly."""
    heads = int(str(info.config.get("num_attention_heads", 1)))
    kv_heads = int(str(info.config.get("num_key_value_heads") or heads))
    if heads % tp_size or (kv_heads % tp_size and tp_size % kv_heads):
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        raise ConfigError(
            f"{heads} attention heads ({kv_heads} key/value heads) cannot be shared by {tp_size} ranks",
            where=f"--tp-size {tp_size}",
            fix=f"use one of {', '.join(map(str, fitting))}",
        )
    if tp_size > 1 and engine == "hf":
        raise ConfigError(
            "the transformers engine has no tensor parallelism", where=f"--tp-size {tp_size}", fix="use --engine sglang"
        )


def dtype_of(settings: EngineSettings, info: TargetInfo) -> torch.dtype:
    """The dtype that the target runs in."""
    return hardware.compute_dtype(info.dtype) if settings.dtype == "auto" else DTYPES[settings.dtype]


def aux_layers_of(settings: EngineSettings, info: TargetInfo) -> tuple[int, ...]:
    layers = settings.aux_layers or default_aux_layers(info.num_layers)
    check_aux_layers(layers, info.num_layers)
    return layers


def load(settings: EngineSettings, info: TargetInfo, ranks: Ranks) -> TargetEngine:
    """The engine, self-checked. Raises EngineError where it cannot be loaded or fails the check."""
    check_tp(info, settings.tp_size, settings.engine)
    layers = aux_layers_of(settings, info)
    dtype = dtype_of(settings, info)
    name = choose(settings.engine)
    try:
        if name == "sglang":
            from specforge.target.sglang.engine import SglangEngine

            engine: TargetEngine = SglangEngine(
                info,
                layers,
                ranks,
                dtype=dtype,
                tokens_per_batch=settings.tokens_per_batch,
                mem_frac=settings.mem_frac,
                trust_remote_code=settings.trust_remote_code,
                answers=isinstance(settings, RegenerateSettings),
            )
        else:
            from specforge.target.hf_engine import HfEngine

            engine = HfEngine(
                info,
                layers,
                ranks,
                dtype=dtype,
                tokens_per_batch=settings.tokens_per_batch,
                trust_remote_code=settings.trust_remote_code,
            )
        engine.self_check()
    except SpecforgeError:
        raise
    except Exception as error:
        raise EngineError(
            f"the {name} engine could not load the target: {type(error).__name__}: {first_line(error)}",
            where=info.path,
            fix=_mended(error),
        ) from error
    return engine


def _mended(error: Exception) -> str:
    if "mem-fraction-static" in str(error):  # SGLang's share must hold the weights and the KV cache
        return "raise --mem-frac or --tp-size, or lower --tokens-per-batch"
    if is_out_of_memory(error):
        return "lower --mem-frac, or raise --tp-size"
    return remedy(error) or "see specforge.log in the output folder (--debug shows the traceback)"


def judge(engine: TargetEngine, config: dict[str, Any], tensors: dict[str, Tensor]) -> DraftJudge | str:
    """SGLang's own draft class beside the running target, or why it cannot be asked."""
    if engine.name != "sglang":
        return "the target does not run in SGLang"
    from specforge.target.sglang.engine import SglangEngine
    from specforge.target.sglang.judge import SglangJudge, unfit

    assert isinstance(engine, SglangEngine)
    return unfit(engine, config) or SglangJudge(engine, config, tensors)


def read_layers(engine: TargetEngine, layers: tuple[int, ...]) -> bool:
    """Lets a running engine capture other aux layers; False where it cannot."""
    if engine.name == "sglang":
        from specforge.target.sglang import judge as sglang
        from specforge.target.sglang.engine import SglangEngine

        assert isinstance(engine, SglangEngine)
        return sglang.read_layers(engine, layers)
    engine.aux_layers = layers
    return True
