"""The three forms in which EAGLE-3 drafts go round, read into one and written from one. Nothing here runs a draft.

    sglang     our own folder: midlayer.*, layer ids for both servers (folder.py)
    vllm       the speculators format: layers.0.*, the layer's settings under `transformer_layer_config`
    safeailab  the EAGLE repository: midlayer.*, no layer ids (it always reads the default layers)

Tensors are never cast, so a way there and back gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specforge.console import say
from specforge.draft import folder as draft_folder
from specforge.draft.model import NORMS
from specforge.errors import CheckpointError
from specforge.files import read_json
from specforge.records import TargetInfo

IDS = "eagle_aux_hidden_state_layer_ids"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PROPOSED_TOKENS = 3  # that vLLM drafts for each pass where nothing else is said
MAPPINGS = ("eagle_config", "rope_parameters", "rope_scaling", "transformer_layer_config", "specforge")
FIX = "give a folder with config.json and *.safetensors, such as runs/draft/best"
RENAMED = (("model.", ""), ("layers.0.", "midlayer."))  # prefixes of other layouts, and ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A draft folder as it was found."""

    folder: Path
    layout: str  # sglang, vllm or safeailab
    config: dict[str, Any]  # config.json under our own names
    tensors: dict[str, Tensor]  # under our own names, d2t and t2d among them

    def key(self, name: str) -> str:
        """Where a key of the config stands."""
        return f"{self.folder / 'config.json'}, '{name}'"

    def tensor(self, name: str) -> str:
        """Where a tensor stands."""
        return f"{self.folder}/*.safetensors, '{name}'"

    @property
    def is_ours(self) -> bool:
        """Written by this project's training, which takes all that it can from the target."""
        return "specforge" in self.config

    @property
    def names_layers(self) -> bool:
        return bool(self.config.get(IDS) or (self.config.get("eagle_config") or {}).get(IDS))


def read(folder: Path) -> Contents:
    """Raises CheckpointError where the folder cannot be read at all; what it holds is not judged here."""
    _look_for_pickles(folder)
    raw = _read_json(folder / "config.json")
    tensors = dict[str, Tensor]()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= load_file(file)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"the weights file is damaged, or cut short: {error}",
                where=str(file),
                fix="copy or fetch the draft again; the whole file is needed",
            ) from error
    if not tensors:
        raise CheckpointError("the draft has no safetensors weights", where=str(folder), fix=FIX)
    _refuse_odd(folder, raw)
    layout = _layout(raw)
    config = _completed(_from_speculators(raw) if layout == "vllm" else raw)
    named = {_own_name(name): tensor for name, tensor in tensors.items()}
    return Contents(folder=folder, layout=layout, config=config, tensors=named | _t2d_of(named, config))


def _t2d_of(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """t2d of a draft that has d2t alone: servers read no more than that."""
    d2t_D, size = tensors.get("d2t"), config.get("vocab_size")
    if d2t_D is None or "t2d" in tensors or d2t_D.dtype != torch.int64 or d2t_D.dim() != 1 or not isinstance(size, int):
        return {}
    kept_D = d2t_D + torch.arange(len(d2t_D))
    if len(kept_D) == 0 or int(kept_D.min()) < 0 or int(kept_D.max()) >= size:
        return {}
    return {"t2d": torch.zeros(size, dtype=torch.bool).index_fill(0, kept_D, True)}


def _look_for_pickles(folder: Path) -> None:
    """Pickles are never opened: beside safetensors they are ignored with a note, such as a trainer's own leftovers."""
    if not folder.is_dir():
        raise CheckpointError("the draft is no folder here", where=str(folder), fix=FIX)
    found = sorted(entry.name for entry in folder.iterdir() if entry.suffix in PICKLED)
    if found and any(folder.glob("*.safetensors")):
        say(f"note: {', '.join(found)} in {folder} are pickles: they are ignored, the safetensors are read")
    elif found:
        raise CheckpointError(
            f"the draft folder holds pickled weights ({', '.join(found)}): loading them can run any code, so they are "
            "never loaded",
            where=str(folder / found[0]),
            fix="ask whoever made it for safetensors, or convert it where you trust it",
        )


def _own_name(name: str) -> str:
    for theirs, ours in RENAMED:
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
    return name


def with_layers(found: Contents, layers: tuple[int, ...]) -> Contents:
    """The draft with its layers (id k: output of layer k) named for both servers."""
    ids = {IDS: [layer + 1 for layer in layers], "eagle_config": {IDS: list(layers), "use_aux_hidden_state": True}}
    return replace(found, config=found.config | ids)


def write(found: Contents, layout: str, output: Path, target: TargetInfo | None, target_name: str | None) -> None:
    """The draft in another layout; `target` is what it is for. Raises CheckpointError where the layout has no place
    for something that the draft needs."""
    shape = draft_folder.config_of(found.config, found.folder)
    config = draft_folder.config_json(shape, found.tensors["fc.weight"].dtype)
    tensors = found.tensors
    if layout == "vllm":
        assert target is not None
        config = _to_speculators(config, target, str(target_name))
        tensors = {name.replace("midlayer.", "layers.0.", 1): tensor for name, tensor in tensors.items()}
    elif layout == "safeailab":
        config = _to_safeailab(found, config, target)
    draft_folder.write(output, config, tensors)


def _refuse_odd(folder: Path, raw: dict[str, Any]) -> None:
    """Everything else reads these parts as what they should be."""
    parts = {"": raw, **{f"{name}.": raw[name] for name in MAPPINGS if isinstance(raw.get(name), dict)}}
    for place, part in parts.items():
        for name, value in part.items():
            odd = None
            if value is not None and name in MAPPINGS and not isinstance(value, dict):
                odd = "no mapping"
            elif value and name == IDS and not (isinstance(value, list) and all(type(layer) is int for layer in value)):
                odd = "no list of whole numbers"
            elif value and name == "architectures" and not isinstance(value, list):
                odd = "no list"
            if odd:
                raise CheckpointError(
                    f"{place}{name} is {odd}: {str(value)[:200]}",
                    where=f"{folder / 'config.json'}, '{place}{name}'",
                    fix="write the layers that the draft was trained on" if name == IDS else "save the draft again",
                )


def _layout(raw: dict[str, Any]) -> str:
    if "speculators_model_type" in raw:
        return "vllm"
    names = raw.get("architectures") or []
    return "sglang" if any("eagle3" in str(name).lower() for name in names) else "safeailab"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the draft's config cannot be read: {error}", where=str(file), fix=FIX) from error
    if not isinstance(raw, dict):
        raise CheckpointError("the draft's config is no JSON object", where=str(file), fix=FIX)
    return raw


def _from_speculators(raw: dict[str, Any]) -> dict[str, Any]:
    """Flat, as vLLM flattens it. Where `norm_before_residual` is not said, vLLM takes true."""
    outer = ("draft_vocab_size", *NORMS, "specforge", "tie_word_embeddings")
    layer = raw.get("transformer_layer_config")
    config = dict(layer) if isinstance(layer, dict) else {}
    config |= {name: raw[name] for name in outer if name in raw}
    config["norm_before_residual"] = raw.get("norm_before_residual", True)
    config["target_hidden_size"] = raw.get("target_hidden_size") or config.get("hidden_size")
    ids = raw.get(IDS)
    if ids:
        config |= {IDS: ids, "eagle_config": {IDS: [layer - 1 for layer in ids], "use_aux_hidden_state": True}}
    return config


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """With what older configs leave to be understood, or say under another name."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or scaling.pop("rope_type", None) or "default"
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0  # of both, transformers takes this
    understood = {
        "num_key_value_heads": heads,
        "head_dim": hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 else None,
        "draft_vocab_size": config.get("vocab_size"),
        "rope_parameters": {**scaling, "rope_theta": theta, "rope_type": kind},
    }
    return config | {name: value for name, value in understood.items() if value and not config.get(name)}


def _to_speculators(config: dict[str, Any], target: TargetInfo, target_name: str) -> dict[str, Any]:
    outer = ("draft_vocab_size", "tie_word_embeddings", "specforge", IDS, "torch_dtype", *NORMS)
    inner = {name: value for name, value in config.items() if name not in (*outer, "architectures", "eagle_config")}
    inner.pop("target_hidden_size")
    proposal = {"proposal_type": "greedy", "speculative_tokens": PROPOSED_TOKENS}
    return {
        "architectures": ["Eagle3DraftModel"],
        "model_type": "speculators",
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": target_name, "architectures": target.config.get("architectures") or []},
        },
        "norm_before_residual": False,  # vLLM takes true where it is not said
        "target_hidden_size": None,  # the draft's own
        **{name: config[name] for name in outer if name in config},
        "transformer_layer_config": inner,
    }


def _to_safeailab(found: Contents, config: dict[str, Any], target: TargetInfo | None) -> dict[str, Any]:
    layers = tuple(config["eagle_config"][IDS])
    fixed = (1, target.num_layers // 2 - 1, target.num_layers - 4) if target else layers
    if layers != fixed:
        raise CheckpointError(
            f"the EAGLE repository always reads layers {list(fixed)}, this draft was trained on {list(layers)}",
            where=str(found.folder / "config.json"),
            fix="train with the default --aux-layers, or export for sglang or vllm",
        )
    norm = next((name for name in NORMS if config.get(name)), None)
    if norm:
        raise CheckpointError(
            f"the EAGLE repository has no {norm}",
            where=f"{found.folder / 'config.json'}, '{norm}'",
            fix="export for sglang or vllm",
        )
    if config["rope_scaling"] is not None:
        raise CheckpointError(
            f"the EAGLE repository has no rope of type {config['rope_scaling'].get('rope_type')}",
            where=f"{found.folder / 'config.json'}, 'rope_scaling'",
            fix="export for sglang or vllm",
        )
    return config | {"architectures": ["LlamaForCausalLM"]}
