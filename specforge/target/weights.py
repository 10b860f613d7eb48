"""The target as files: configuration, fingerprint, embedding and output head. Nothing here runs the model."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from transformers import AutoConfig

from specforge.errors import ConfigError, EngineError, first_line
from specforge.records import TargetHead, TargetInfo

LEAST_LAYERS = 4  # three of layers 0 .. N-2
SAMPLED_BYTES = 64  # at the start, middle and end of each tensor
VOLATILE_KEYS = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures"}


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
        readable = isinstance(json.loads((folder / "config.json").read_text(encoding="utf-8")), dict)
    except ValueError:
        readable = False
    if not readable:
        raise ConfigError(
            "the target's config.json is no JSON object", where=f"{folder}/config.json", fix="fetch the target again"
        )
    return folder


def describe(model_path: str, trust_remote_code: bool = False) -> TargetInfo:
    """Reads config and fingerprint; loads no weights."""
    folder = resolve(model_path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the target's config cannot be read: {first_line(error)}",
            where=f"{folder}/config.json",
            fix="use a model that this version of transformers knows, or --trust-remote-code if its code is trusted",
        ) from error
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    return TargetInfo(
        path=str(folder),
        fingerprint=fingerprint(folder),
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


def _tensor_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise EngineError(
            "the target has no safetensors weights (pickled weights are never loaded)",
            where=str(folder),
            fix="convert it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)",
        )
    return files


def _headers(folder: Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """(file, start of its data, {name: {dtype, shape, data_offsets}}) of each weights file."""
    for file in _tensor_files(folder):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > file.stat().st_size:
                    raise ValueError("the header is longer than the file")
                header = json.loads(stream.read(length))
        except (struct.error, ValueError, OSError) as error:
            raise EngineError(
                "the weights file is damaged", where=str(file), fix="fetch or convert the target again"
            ) from error
        header.pop("__metadata__", None)
        yield file, 8 + length, header


def fingerprint(folder: Path) -> str:
    """A fine-tune of the same shape differs: config, and each tensor's name, shape, dtype and sampled bytes."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest = xxhash.xxh3_128(
        json.dumps({k: v for k, v in config.items() if k not in VOLATILE_KEYS}, sort_keys=True).encode()
    )
    parts = []
    for file, data_start, header in _headers(folder):
        with file.open("rb") as stream:
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                content = b""
                for at in (begin, (begin + end) // 2, max(begin, end - SAMPLED_BYTES)):
                    stream.seek(data_start + at)
                    content += stream.read(min(SAMPLED_BYTES, end - at))
                parts.append((name, entry["dtype"], tuple(entry["shape"]), xxhash.xxh3_64_hexdigest(content)))
    digest.update(repr(sorted(parts)).encode())
    return digest.hexdigest()


def loaded_bytes(info: TargetInfo, dtype: torch.dtype) -> int:
    """Of all tensors as they lie in memory, from the files' headers: floating point in `dtype`, quantised as stored."""
    total = 0
    for _, _, header in _headers(Path(info.path)):
        for entry in header.values():
            begin, end = entry["data_offsets"]
            floating = entry["dtype"] in ("F32", "F16", "BF16")
            total += math.prod(entry["shape"]) * dtype.itemsize if floating else end - begin
    return total


def load_head(info: TargetInfo, dtype: torch.dtype) -> TargetHead:
    """Embedding and output head, from the one or two tensors that hold them."""
    folder = Path(info.path)
    where = {name: file for file, _, header in _headers(folder) for name in header}

    def tensor(suffix: str) -> torch.Tensor | None:
        name = next((name for name in where if name.endswith(suffix)), None)
        if name is None:
            return None
        with safe_open(where[name], framework="pt") as file:
            return file.get_tensor(name).to(dtype)

    embedding_VH = tensor("embed_tokens.weight")
    if embedding_VH is None or tensor("lm_head.bias") is not None:
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
