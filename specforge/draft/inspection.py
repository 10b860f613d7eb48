"""What is wrong with a draft folder, as a server would meet it: every fault by itself, in words. No draft is run here.

Servers say nothing of most of it. SGLang drops keys that it does not know, leaves missing ones at their random start,
and takes default layers where ids are missing; each only costs accepted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specforge import hardware
from specforge.draft.layouts import IDS, Contents
from specforge.draft.model import served_rope
from specforge.errors import SpecforgeError
from specforge.records import TargetInfo

SIZES = (
    "hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size draft_vocab_size "
    "max_position_embeddings"
).split()
SAVE = "write the folder anew with `specforge train`, or fetch the draft again"
SERVED = (torch.bfloat16, torch.float16, torch.float32)
BEYOND = {  # what this project's own draft model does not do, and who does
    "norm_before_residual": "vLLM does it, SGLang does not and would accept about one token a pass",
    "attention_bias": "SGLang leaves the biases out without a word",
    "quantization_config": "quantised drafts are not read here",
}
DROPPED = ("norm_before_residual", "attention_bias")
DROPPED_FIX = "serve it only where it is honoured, or use a draft without it"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a draft. A fault spoils it; what is no fault is worth knowing (a note)."""

    what: str
    where: str
    fix: str
    fault: bool = True

    def __str__(self) -> str:
        return str(SpecforgeError(self.what, where=self.where, fix=self.fix))


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is looked at, and what it is for."""

    found: Contents
    target: TargetInfo
    highest_token: int  # of the target's tokenizer
    special_ids: list[int]  # end of turn and the like


def inspect(subject: Subject) -> dict[str, list[Finding]]:
    """What each check found, by the check's name."""
    return of_folder(subject.found) | {name: list(check(subject)) for name, check in AGAINST_TARGET.items()}


def of_folder(found: Contents) -> dict[str, list[Finding]]:
    """The same of the checks that need no target."""
    return {name: list(check(found)) for name, check in OF_FOLDER.items()}


def beyond(found: Contents) -> list[str]:
    """What the config asks for that this project's draft model does not do."""
    eagle_config = found.config.get("eagle_config") or {}
    return [name for name in BEYOND if found.config.get(name) or eagle_config.get(name)]


def _settings(found: Contents) -> Iterator[Finding]:
    config = found.config
    for name in SIZES:
        if not isinstance(config.get(name), int) or config[name] < 1:
            what = f"the config's {name} is {config.get(name)!r}, not a number above 0"
            yield Finding(what, found.key(name), SAVE)
    if config.get("num_hidden_layers", 1) != 1:
        what = f"the draft has {config['num_hidden_layers']} layers; EAGLE-3 drafts that specforge reads have one"
        yield Finding(what, found.key("num_hidden_layers"), "use a draft of one layer")
    if config.get("hidden_act", "silu") != "silu":
        what = f"the MLP's function is {config['hidden_act']}, the servers' draft class has silu"
        yield Finding(what, found.key("hidden_act"), SAVE)
    if config.get("tie_word_embeddings"):
        what = "tie_word_embeddings is true: SGLang would use the embedding in place of the draft's own head"
        yield Finding(what, found.key("tie_word_embeddings"), "write false")
    if found.layout != "sglang":
        what = f"the folder is in the layout of {found.layout}; SGLang does not load it as it is"
        fix = f"specforge export {found.folder} --to sglang --output NEW"
        yield Finding(what, found.key("architectures"), fix, fault=False)
    for name in beyond(found):
        # SGLang cannot load the speculators format at all: what it would not honour is no fault there
        fault = name in DROPPED and found.layout != "vllm"
        yield Finding(f"the config asks for {name}: {BEYOND[name]}", found.key(name), DROPPED_FIX, fault)


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of every tensor of the contract. Raises TypeError or KeyError where the config lacks a size."""
    hidden, inner, draft = config["hidden_size"], config["intermediate_size"], config["draft_vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    inner_ids = config.get("eagle_config") or {}
    count, aux = len(inner_ids.get(IDS) or (0, 0, 0)), config.get("target_hidden_size") or hidden
    norms = dict.fromkeys(("midlayer.input_layernorm", "midlayer.hidden_norm", "norm"), hidden)
    norms["midlayer.post_attention_layernorm"] = hidden
    if config.get("fc_norm"):
        norms |= {f"fc_norm.{at}": aux for at in range(count)}
    if inner_ids.get("norm_before_fc", config.get("norm_before_fc")):
        norms["input_norm"] = count * aux
    return {
        "fc.weight": (hidden, count * aux),
        "midlayer.self_attn.q_proj.weight": (queries, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (keys, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (keys, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, queries),
        "midlayer.mlp.gate_proj.weight": (inner, hidden),
        "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
        "lm_head.weight": (draft, hidden),
        "d2t": (draft,),
        "t2d": (config["vocab_size"],),
        **{f"{name}.weight": (size,) for name, size in norms.items()},
    }


def expected(found: Contents) -> dict[str, tuple[int, ...]]:
    """The tensors that the folder must hold; none where the config lacks a size (a fault of its own)."""
    try:
        shapes = _shapes(found.config)
    except (KeyError, TypeError):
        return {}
    if found.config["draft_vocab_size"] == found.config["vocab_size"] and "d2t" not in found.tensors:
        del shapes["d2t"], shapes["t2d"]  # the whole vocabulary needs no map
    return shapes


def _keys(found: Contents) -> Iterator[Finding]:
    shapes, held = expected(found), found.tensors
    if not shapes:
        return
    unknown = [name for name in held if name not in shapes and name != "embed_tokens.weight"]
    for name in [name for name in shapes if name not in held]:
        alike = next((other for other in unknown if tuple(held[other].shape) == shapes[name]), None)
        if alike:
            unknown.remove(alike)
            what = f"'{alike}' stands where '{name}' should: SGLang would drop it and leave '{name}' at random"
            yield Finding(what, found.tensor(alike), f"rename it to '{name}'")
        else:
            what = f"'{name}' is missing: SGLang would leave it at its random start without a word"
            yield Finding(what, found.tensor(name), SAVE)
    for name in unknown:
        what = f"'{name}' is no tensor of an EAGLE-3 draft: SGLang drops it, vLLM refuses the folder"
        yield Finding(what, found.tensor(name), "remove it, if the draft does without it")
    if "embed_tokens.weight" in held:
        what = "the draft brings its own embedding: SGLang takes the target's in its place"
        yield Finding(what, found.tensor("embed_tokens.weight"), "leave it out of the file", fault=False)


def _tensor_shapes(found: Contents) -> Iterator[Finding]:
    for name, shape in expected(found).items():
        tensor = found.tensors.get(name)
        if tensor is not None and tuple(tensor.shape) != shape:
            what = f"'{name}' is {list(tensor.shape)}, the config's sizes make it {list(shape)}"
            if "self_attn" in name:
                config = found.config
                heads = f"{config['num_attention_heads']} heads ({config['num_key_value_heads']} for keys)"
                what += f": {heads} of dimension {config['head_dim']}"
            yield Finding(what, f"{found.tensor(name)} and {found.folder}/config.json", SAVE)


def _dtypes(found: Contents) -> Iterator[Finding]:
    for name in expected(found):
        tensor = found.tensors.get(name)
        if tensor is None:
            continue
        allowed = {"d2t": (torch.int64,), "t2d": (torch.bool,)}.get(name, SERVED)
        if tensor.dtype not in allowed:
            names = " or ".join(hardware.name(dtype) for dtype in allowed)
            what = f"'{name}' is {str(tensor.dtype).removeprefix('torch.')}, not {names}"
            yield Finding(what, found.tensor(name), SAVE)
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            yield Finding(f"'{name}' holds values that are not finite", found.tensor(name), SAVE)


def _vocabulary_map(found: Contents) -> Iterator[Finding]:
    """d2t (target id minus draft id) and t2d (whether a target id is in the draft vocabulary) say the same."""
    d2t_D, t2d_V = found.tensors.get("d2t"), found.tensors.get("t2d")
    if d2t_D is None or t2d_V is None or d2t_D.dtype != torch.int64 or t2d_V.dtype != torch.bool:
        return  # a fault of the keys or dtypes
    kept_D, named = d2t_D + torch.arange(len(d2t_D)), torch.nonzero(t2d_V).squeeze(1)
    where, fix = found.tensor("d2t"), "train again, or fetch the draft again; the map cannot be guessed"
    if torch.equal(d2t_D, named) and not torch.equal(kept_D, named):
        what = "d2t holds the target's ids themselves: servers read it as target id minus draft id"
        yield Finding(what, where, "subtract 0, 1, 2, ... from its entries")
    elif torch.equal(torch.nonzero(~t2d_V).squeeze(1), kept_D):
        what = "t2d is inverted: true where a token is NOT in the draft vocabulary"
        yield Finding(what, found.tensor("t2d"), "invert it")
    elif not (kept_D[1:] > kept_D[:-1]).all():
        at = int(torch.nonzero(kept_D[1:] <= kept_D[:-1])[0])
        what = (
            f"d2t is not ascending: draft tokens {at} and {at + 1} stand for target tokens {int(kept_D[at])} and "
            f"{int(kept_D[at + 1])}"
        )
        yield Finding(what, where, fix)
    elif int(kept_D[0]) < 0 or int(kept_D[-1]) >= len(t2d_V):
        what = f"d2t names target tokens {int(kept_D[0])} .. {int(kept_D[-1])}, the target has 0 .. {len(t2d_V) - 1}"
        yield Finding(what, where, fix)
    elif not torch.equal(kept_D, named):
        apart = len(set(kept_D.tolist()) ^ set(named.tolist()))
        yield Finding(f"d2t and t2d disagree about {apart} token(s)", where, fix)


def _layer_ids(subject: Subject) -> Iterator[Finding]:
    found, last = subject.found, subject.target.num_layers - 2
    where, fix = found.key(IDS), "write the layers that the draft was trained on, for both servers"
    sglang: list[int] = (found.config.get("eagle_config") or {}).get(IDS) or []
    vllm: list[int] = found.config.get(IDS) or []
    if not sglang and not vllm:
        safeailab = found.layout == "safeailab"
        what = "the draft names no layer ids: servers take their default layers" + (
            ", as the EAGLE repository does" if safeailab else ", whatever it was trained on"
        )
        target = f"--model-path {subject.target.path}"
        fix = f"if those are right: specforge export {found.folder} --to sglang {target} --output NEW"
        yield Finding(what, where, fix, fault=not safeailab)
        return
    for who, place, ids, first in (("SGLang", "in eagle_config", sglang, 0), ("vLLM", "at the top level", vllm, 1)):
        if not ids:
            own = [layer + 1 for layer in sglang] if who == "vLLM" else [layer - 1 for layer in vllm]
            what = f"{who}'s layer ids are missing: it takes its default layers, whatever the draft was trained on"
            yield Finding(what, where, f"add '{IDS}': {own} {place}")
        elif not _ascending(ids, first, last + first):
            what = f"{who}'s layer ids {ids} are not three ascending ids in {first} .. {last + first}"
            yield Finding(what, where, fix)
    if sglang and vllm and list(vllm) != [layer + 1 for layer in sglang]:
        what = (
            f"SGLang's layer ids {sglang} and vLLM's {vllm} are not the same layers: SGLang's id k is the output of "
            "layer k, vLLM's its input, so vLLM's must be one higher"
        )
        yield Finding(what, where, fix)


def _ascending(ids: list[int], lowest: int, highest: int) -> bool:
    return len(ids) == 3 and list(ids) == sorted(set(ids)) and lowest <= ids[0] and ids[-1] <= highest


def _sizes(subject: Subject) -> Iterator[Finding]:
    found, config, target = subject.found, subject.found.config, subject.target
    for name, own in (("vocab_size", target.vocab_size), ("hidden_size", target.hidden_size)):
        if isinstance(config.get(name), int) and config[name] != own:
            what = f"the draft's {name} is {config[name]}, the target's {own}"
            fix = "write the target's" if name == "vocab_size" else "give the draft's own target with --model-path"
            yield Finding(what, found.key(name), fix)
    seen = config.get("target_hidden_size")
    if seen not in (None, target.hidden_size):
        what = f"the draft reads states of {seen} numbers, the target's have {target.hidden_size}"
        yield Finding(what, found.key("target_hidden_size"), "give the draft's own target with --model-path")


def _rope(subject: Subject) -> Iterator[Finding]:
    """A draft may have a rope of its own, if it was trained so; this project's drafts have their target's."""
    found, config, target = subject.found, subject.found.config, subject.target.config
    own: dict[str, Any] = config.get("rope_parameters") or {}
    rope = served_rope(target)
    if "rope_theta" in config and config["rope_theta"] != own.get("rope_theta"):
        what = (
            f"rope_theta is {config['rope_theta']} at the top level and {own.get('rope_theta')} in rope_parameters: "
            "which one is read depends on the server's version"
        )
        yield Finding(what, found.key("rope_theta"), f"write the target's ({rope.get('rope_theta')}) in both")
    fault, note = found.is_ours, "; right only if it was trained so: see the acceptance"
    for name in sorted({"rope_type", "rope_theta"} | set(own) | set(rope)):
        mine, its = own.get(name), rope.get(name)
        if mine != its and not (name == "rope_type" and all(kind in (None, "default") for kind in (mine, its))):
            what = f"the draft's {name} is {mine}, the target's {its}" + ("" if fault else note)
            yield Finding(what, found.key(f"rope_parameters.{name}"), "write the target's", fault)
    reach, needed = config.get("max_position_embeddings"), target.get("max_position_embeddings")
    if isinstance(reach, int) and isinstance(needed, int) and reach < needed:
        what = (
            f"max_position_embeddings is {reach}, the target's {needed}: behind position {reach} a server stops or "
            "drafts wrongly"
        )
        yield Finding(what, found.key("max_position_embeddings"), f"write {needed}")


def _tokenizer(subject: Subject) -> Iterator[Finding]:
    found, config, target = subject.found, subject.found.config, subject.target.config
    for name in ("bos_token_id", "eos_token_id"):
        if isinstance(target.get(name), int) and name in config and config[name] != target[name]:
            what = f"the draft's {name} is {config[name]}, the target's {target[name]}"
            yield Finding(what, found.key(name), "write the target's", fault=found.is_ours)
    if subject.highest_token >= subject.target.vocab_size:
        what = f"the target's tokenizer has token {subject.highest_token}, its model {subject.target.vocab_size} tokens"
        yield Finding(what, subject.target.path, "fetch the target again")
    t2d_V: Tensor | None = found.tensors.get("t2d")
    if t2d_V is not None and t2d_V.dtype == torch.bool:
        lost = [token for token in subject.special_ids if token >= len(t2d_V) or not t2d_V[token]]
        if lost:
            what = f"special tokens {lost[:8]} are not in the draft vocabulary: the draft can never propose them"
            yield Finding(what, found.tensor("t2d"), "a draft of specforge always has them", fault=False)


OF_FOLDER: dict[str, Callable[[Contents], Iterator[Finding]]] = {
    "config": _settings,
    "keys": _keys,
    "shapes": _tensor_shapes,
    "dtypes": _dtypes,
    "d2t, t2d": _vocabulary_map,
}
AGAINST_TARGET: dict[str, Callable[[Subject], Iterator[Finding]]] = {
    "layer ids": _layer_ids,
    "sizes": _sizes,
    "rope": _rope,
    "tokenizer": _tokenizer,
}
