"""The target as files: configuration, fingerprint, embedding and output head. Nothing here runs the model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from specforge.errors import ConfigError, EngineError, first_line
from specforge.files import read_json
from specforge.records import TargetHead, TargetInfo
from specforge.target.tensors import fingerprint, headers

OTHERS = re.compile(r"(^|\.)(layers|mtp\w*|vision\w*|visual|audio\w*|draft\w*|decoder_mtp)\.")  # parts with their own
MOST_LAYERS = 10_000
LEAST_LAYERS = 4  # three of layers 0 .. N-2


def resolve(model_path: str) -> Path:
    """The target's folder; a hub name is downloaded (weights in safetensors only) or found in the hub's cache."""
    folder = Path(model_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model_path, ignore_patterns=["*.bin", "*.pth", "*.pt", "original/*"]))
        except Exception as error:  # the hub library raises many kinds; all mean: not to be had
            raise ConfigError(
                f"the target is no folder here and could not be fetched from the hub ({type(error).__name__})",
                where=f"--model-path {model_path}",
                fix="give a model folder, or check the name and the network",
            ) from error
    if not (folder / "config.json").is_file():
        raise ConfigError(
            "the target has no config.json", where=str(folder), fix="give the folder of a model in Hugging Face layout"
        )
    try:
        config = read_json(folder / "config.json")
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ConfigError(
            "the target's config.json is no JSON object", where=f"{folder}/config.json", fix="fetch the target again"
        )
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name, value in part.items():
            if "layers" in name and isinstance(value, int) and value > MOST_LAYERS:  # configs make lists of that length
                raise ConfigError(
                    f"a target of {value:,} layers is no model",
                    where=f"{folder}/config.json, '{name}'",
                    fix="fetch the target again",
                )
    return folder


def describe(model_path: str, trust_remote_code: bool = False, fingerprinted: bool = True) -> TargetInfo:
    """Reads the config; loads no weights, but hashes them for the fingerprint. Without one it is empty, for callers
    that compare nothing with the target."""
    folder = resolve(model_path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
    except Exception as error:  # transformers raises many kinds
        raise ConfigError(
            f"the target's config cannot be read: {first_line(error)}",
            where=f"{folder}/config.json",
            fix="use a model that this version of transformers knows, or --trust-remote-code if its code is trusted",
        ) from error
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if type(found := getattr(config, name, None)) is not int or found < 1:
            raise ConfigError(
                f"the target's {name} is {found!r}, not a number above 0",
                where=f"{folder}/config.json, '{name}'",
                fix="give a language model in Hugging Face layout",
            )
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    return TargetInfo(
        path=str(folder),
        fingerprint=fingerprint(folder) if fingerprinted else "",
        config=json.loads(config.to_json_string(use_diff=False)),
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        dtype=dtype,
    )


def default_aux_layers(num_layers: int) -> tuple[int, ...]:
    """The layers that servers take where a draft names none: one low, one middle, one high. In a target of 4 to 6
    layers these are not three, so the first, the middle and the last of those that can be captured (0 .. N-2)."""
    layers = (1, num_layers // 2 - 1, num_layers - 4)
    if 1 < layers[1] < layers[2]:
        return layers
    if num_layers < LEAST_LAYERS:
        raise ConfigError(
            f"a target of {num_layers} layers has no three aux layers: the last layer's output is not one of them",
            where="the target's config.json, 'num_hidden_layers'",
            fix=f"choose a target of at least {LEAST_LAYERS} layers",
        )
    return (0, (num_layers - 2) // 2, num_layers - 2)


def check_aux_layers(layers: tuple[int, ...], num_layers: int) -> None:
    """Servers capture layers 0 .. N-2, ascending, each once; anything else would be fed wrong without a word."""
    default = default_aux_layers(num_layers)
    if len(layers) != 3 or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] <= num_layers - 2:
        raise ConfigError(
            f"the aux layers {spaced(layers)} are not three ascending ids in 0 .. {num_layers - 2}",
            where="--aux-layers",
            fix=f"leave it out for the default ({spaced(default)}), or name three ascending ids",
        )


def spaced(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


def loaded_bytes(info: TargetInfo, dtype: torch.dtype) -> int:
    """Of all tensors as they lie in memory, from the files' headers: floating point in `dtype`, quantised as stored."""
    total = 0
    for _, entries in headers(Path(info.path)):
        for entry in entries:
            floating = entry.dtype in ("F32", "F16", "BF16")
            total += math.prod(entry.shape) * dtype.itemsize if floating else entry.end - entry.begin
    return total


def load_head(info: TargetInfo, dtype: torch.dtype) -> TargetHead:
    """Embedding and output head, from the one or two tensors that hold them."""
    return _head_of(info, lambda file, name: file.get_tensor(name).to(dtype))


def sample_head(info: TargetInfo, ids_n: Tensor) -> TargetHead:
    """The same for some tokens: rows [n, H] in float32, of which no others are read."""
    rows = ids_n.tolist()
    return _head_of(info, lambda file, name: torch.cat([file.get_slice(name)[row : row + 1] for row in rows]).float())


def _head_of(info: TargetInfo, read: Callable[[Any, str], Tensor]) -> TargetHead:
    folder = Path(info.path)
    where = {entry.name: file for file, entries in headers(folder) for entry in entries}

    def tensor(suffix: str) -> Tensor | None:
        names = [name for name in where if re.search(rf"(^|\.){re.escape(suffix)}$", name) and not OTHERS.search(name)]
        if not names:
            return None
        name = min(names, key=len)
        with safe_open(where[name], framework="pt") as file:
            return read(file, name)

    embedding_VH = tensor("embed_tokens.weight")
    if embedding_VH is None or any(name.endswith("lm_head.bias") for name in where):
        raise EngineError(
            "the target's embedding or head has an unusual form (no embed_tokens.weight, or a head with a bias)",
            where=str(folder),
            fix="this target is not supported yet",
        )
    tied = bool(info.config.get("tie_word_embeddings"))
    head_VH = None if tied else tensor("lm_head.weight")
    config: dict[str, Any] = info.config
    return TargetHead(
        embedding_VH=embedding_VH,
        head_VH=embedding_VH if head_VH is None else head_VH,
        scale=float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0),
        softcap=config.get("final_logit_softcapping"),
    )
