"""The draft on disk: a folder that SGLang and vLLM load as it is. config.json and model.safetensors, nothing else.

Layer ids stand there twice, once for each server: SGLang's id k is the output of layer k, vLLM's the input of layer k.
"""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge import hardware
from specforge.draft.model import NORMS, DraftConfig, Eagle3Draft
from specforge.errors import CheckpointError
from specforge.files import read_json, sync_file, sync_folder, write_json

FIX = "give a folder that `specforge train` wrote, such as runs/draft/best"
UNFIT = (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError)  # of torch, transformers
TOKENS = ("bos_token_id", "eos_token_id")
ARCHITECTURE = "LlamaForCausalLMEagle3"


def config_json(config: DraftConfig, dtype: torch.dtype) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.hidden_size,
        "tie_word_embeddings": False,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "rope_parameters": rope,
        "torch_dtype": hardware.name(dtype),
        **config.token_ids,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
            "use_aux_hidden_state": True,
            **({"norm_before_fc": True} if config.norm_before_fc else {}),
        },
        **{name: True for name in NORMS if getattr(config, name)},
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in config.aux_layers],
        "specforge": {"target_fingerprint": config.target_fingerprint},
    }


def tensors(draft: Eagle3Draft, kept_D: Tensor, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The file's tensors: `weights` by their own names, and the draft vocabulary as d2t and t2d."""
    content = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights.items()}
    missing = set(draft.state_dict()) ^ set(content)
    if missing:
        raise AssertionError(f"the draft's tensors are not those of its folder: {sorted(missing)}")
    kept_D = kept_D.cpu()
    content["d2t"] = kept_D - torch.arange(len(kept_D))
    content["t2d"] = torch.zeros(draft.config.vocab_size, dtype=torch.bool).index_fill(0, kept_D, True)
    return content


def save(folder: Path, draft: Eagle3Draft, kept_D: Tensor, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Writes the folder beside and renames it, replacing an older one."""
    write(folder, config_json(draft.config, dtype), tensors(draft, kept_D, weights, dtype))


def write(folder: Path, config: dict[str, Any], content: dict[str, Tensor]) -> None:
    """The same for what is ready to be written, in whatever layout."""
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_file(content, beside / "model.safetensors", metadata={"format": "pt"})
    sync_file(beside / "model.safetensors")
    write_json(beside / "config.json", config)
    replace_folder(beside, folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`. A kill in between leaves the old one under `.NAME.old`, never a mixture."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


CONFIGS = TypeAdapter(DraftConfig)


def config_of(raw: dict[str, Any], folder: Path) -> DraftConfig:
    """What config.json says. Raises CheckpointError where something is missing or of another type."""
    names = {field.name for field in fields(DraftConfig)} - {"aux_layers", "target_fingerprint", "token_ids", *NORMS}
    try:
        eagle_config = raw["eagle_config"]
        return CONFIGS.validate_python(
            {name: raw[name] for name in names}
            | {
                "aux_layers": tuple(eagle_config["eagle_aux_hidden_state_layer_ids"]),
                "target_fingerprint": (raw.get("specforge") or {}).get("target_fingerprint", ""),
                "token_ids": {name: raw[name] for name in TOKENS if type(raw.get(name)) is int},
                "fc_norm": bool(raw.get("fc_norm")),
                "norm_before_fc": bool(eagle_config.get("norm_before_fc", raw.get("norm_before_fc"))),
                "norm_output": bool(raw.get("norm_output")),
            },
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        said = f"no {error}"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            said = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        raise CheckpointError(
            f"the draft's config cannot be used: {said}", where=str(folder / "config.json"), fix=FIX
        ) from error


def load(folder: Path, dtype: torch.dtype) -> tuple[Eagle3Draft, Tensor]:
    """(draft, kept_D). Raises CheckpointError where the folder is not a whole draft in this form."""
    try:
        raw = read_json(folder / "config.json")
        content = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the draft cannot be read: {error}", where=str(folder), fix=FIX) from error
    config = config_of(raw, folder)
    try:
        d2t_D, t2d_V = content.pop("d2t"), content.pop("t2d", None)
        with torch.device("meta"):  # before memory is taken for sizes that a config only claims
            shapes = {name: list(tensor.shape) for name, tensor in Eagle3Draft(config).state_dict().items()}
        found = {name: list(tensor.shape) for name, tensor in content.items()} | {"d2t": list(d2t_D.shape)}
        shapes["d2t"] = [config.draft_vocab_size]
        for name in sorted(shapes.keys() | found.keys()):
            if shapes.get(name) != found.get(name):
                raise ValueError(
                    f"{name} is {found.get(name, 'missing')}, not {shapes.get(name, 'a tensor of a draft')}"
                )
        kept_D = d2t_D + torch.arange(len(d2t_D))
        _check(raw, config, kept_D, t2d_V)
        draft = Eagle3Draft(config)
        draft.load_state_dict(content)
    except (*UNFIT, StrictDataclassError) as error:
        raise CheckpointError(
            f"the draft's config and tensors do not fit: {str(error)[:300]}", where=str(folder), fix=FIX
        ) from error
    return draft.to(dtype), kept_D


def _check(raw: dict[str, Any], config: DraftConfig, kept_D: Tensor, t2d_V: Tensor | None) -> None:
    """Raises ValueError where the folder contradicts itself: a server would read the other half."""
    vllm = raw["eagle_aux_hidden_state_layer_ids"]
    if vllm != [layer + 1 for layer in config.aux_layers]:
        raise ValueError(
            f"eagle_aux_hidden_state_layer_ids: SGLang's {list(config.aux_layers)} and vLLM's {vllm} "
            "are not the same layers (vLLM's are one higher)"
        )
    if kept_D.min() < 0 or kept_D.max() >= config.vocab_size:
        raise ValueError("d2t names tokens outside the target's vocabulary")
    if t2d_V is not None and not torch.equal(torch.nonzero(t2d_V).squeeze(1), kept_D):
        raise ValueError("d2t and t2d name different tokens, or are not ascending")
