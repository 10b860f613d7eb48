"""The draft model. Its parameters carry the names that they have on disk.

    feature_TH = fc(aux_TA)                                   aux states of the target, fused
    x = cat(input_layernorm(embedding), hidden_norm(feature)) -> q, k, v      (2H in, so any EAGLE-3 server's layout)
    h = feature + o_proj(attention);  h = h + mlp(post_attention_layernorm(h))
    logits = lm_head(norm(h));        the next step's feature is h itself, before `norm`

EAGLE-3.1 is the same with norms where scales can drift: before `fc`, over each aux state (`fc_norm`) or over all of
them at once (`norm_before_fc`), and on what the next step gets (`norm_output`: norm(h) in place of h).

Source: EAGLE-3 (Li et al., 2025), and the draft class of the servers that load the folder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specforge.records import TargetHead, TargetInfo

Size = Annotated[int, Field(gt=0, lt=1 << 31, strict=True)]
ROPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
NORMS = ("fc_norm", "norm_before_fc", "norm_output")  # of EAGLE-3.1


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """The draft's shape. Sizes are in elements; the rest is inherited from the target."""

    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    rms_norm_eps: float
    vocab_size: Size  # of the target
    draft_vocab_size: Size
    max_position_embeddings: Size
    rope_parameters: dict[str, Any]
    aux_layers: tuple[int, ...]  # id k: output of layer k
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False
    target_fingerprint: str = ""
    token_ids: dict[str, int] = field(default_factory=dict)  # bos_token_id, eos_token_id

    @classmethod
    def for_target(
        cls,
        info: TargetInfo,
        aux_layers: tuple[int, ...],
        draft_vocab_size: int,
        intermediate_size: int | None = None,
        **norms: bool,  # by their names in NORMS
    ) -> DraftConfig:
        config: dict[str, Any] = info.config
        heads = int(config["num_attention_heads"])
        rope = served_rope(config)
        ids = {name: config.get(name) for name in ("bos_token_id", "eos_token_id")}
        return cls(
            hidden_size=info.hidden_size,
            intermediate_size=intermediate_size or int(config.get("intermediate_size") or 4 * info.hidden_size),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=_head_dim(config),
            rms_norm_eps=float(config.get("rms_norm_eps") or 1e-5),
            vocab_size=info.vocab_size,
            draft_vocab_size=min(draft_vocab_size, info.vocab_size),
            max_position_embeddings=int(config.get("max_position_embeddings") or 2048),
            rope_parameters=rope,
            aux_layers=aux_layers,
            target_fingerprint=info.fingerprint,
            token_ids={name: value for name, value in ids.items() if isinstance(value, int)},
            **norms,
        )


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // int(config["num_attention_heads"]))


def served_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rope of a draft for the target with this config: the target's, as far as the servers' draft class has it.

    That class rotates the whole head, and knows the kinds of ROPES. It reads `attn_factor`, a factor beside yarn's own,
    in place of `attention_factor`, which transformers reads: both are written. A draft need not have its target's rope;
    a kind that the class cannot compute becomes the default one."""
    rope = dict(config.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10000.0})
    if "rope_theta" not in rope:  # one set of parameters for each kind of layer: the draft's attends to everything
        rope = dict(rope.get("full_attention") or {"rope_type": "default", "rope_theta": 10000.0})
    rope = _of_class(rope, _head_dim(config))
    if rope.get("rope_type") == "yarn" and rope.get("attention_factor") is not None:
        own = yarn_factor({name: value for name, value in rope.items() if name != "attn_factor"})
        rope["attn_factor"] = float(rope["attention_factor"]) / own
    return rope


def _of_class(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """The parameters that the servers' draft class can compute with."""
    kind = rope.get("rope_type", "default")
    factors = [rope.get(name) for name in ("short_factor", "long_factor")]
    if kind not in ROPES or (kind == "longrope" and any(2 * len(found or ()) != head_dim for found in factors)):
        return {"rope_type": "default", "rope_theta": float(rope.get("rope_theta") or 10000.0)}
    return {name: value for name, value in rope.items() if name != "partial_rotary_factor"}


def yarn_factor(rope: dict[str, Any]) -> float:
    """By what cosine and sine are multiplied, as SGLang and vLLM compute it.

    Source: YaRN (Peng et al., 2023), 0.1 ln(factor) + 1; with two scales (DeepSeek-V2), their quotient."""

    def scale(weight: float) -> float:
        factor = float(rope.get("factor") or 1.0)
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    two = rope.get("mscale") is not None and rope.get("mscale_all_dim") is not None
    own = scale(float(rope["mscale"])) / scale(float(rope["mscale_all_dim"])) if two else scale(1.0)
    return own * float(rope.get("attn_factor") or 1.0)


class Rotary:
    """The target's rotary embedding, in fp32 or wider. No module: a cast of the draft must not reach its frequencies.

    They are transformers', which serving engines share but for two kinds. `dynamic`: transformers changes its base with
    the length of each batch, SGLang and vLLM fix it for the longest text. `yarn`: see `yarn_factor`. A draft is for the
    servers."""

    def __init__(self, config: DraftConfig) -> None:
        rope = _of_class(config.rope_parameters, config.head_dim)
        dynamic = rope.get("rope_type") == "dynamic"
        if dynamic:
            factor, dim = float(rope["factor"]), config.head_dim
            stretch = (factor * factor - (factor - 1)) ** (dim / (dim - 2))
            rope = {"rope_type": "default", "rope_theta": rope["rope_theta"] * stretch}
        llama = LlamaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=rope,
        )
        rotary = LlamaRotaryEmbedding(llama)
        self.frequencies_e: Tensor = rotary.inv_freq  # half as many as a head has elements
        self.factor: float = rotary.attention_scaling  # of cosine and sine
        if rope.get("rope_type") == "yarn":
            self.factor = yarn_factor(rope)

    def __call__(self, x_RnE: Tensor, positions_R: Tensor) -> Tensor:
        """Rotates each head of x at its row's position."""
        if self.frequencies_e.device != x_RnE.device:
            self.frequencies_e = self.frequencies_e.to(x_RnE.device)
        wide = torch.promote_types(x_RnE.dtype, torch.float32)
        angle_R1e = positions_R[:, None, None].to(wide) * self.frequencies_e.to(wide)
        cos_R1e, sin_R1e = angle_R1e.cos() * self.factor, angle_R1e.sin() * self.factor
        first, second = x_RnE.to(wide).chunk(2, dim=-1)
        turned = [first * cos_R1e - second * sin_R1e, second * cos_R1e + first * sin_R1e]
        return torch.cat(turned, dim=-1).to(x_RnE.dtype)


class Attention(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(2 * hidden, queries, bias=False)
        self.k_proj = nn.Linear(2 * hidden, keys, bias=False)
        self.v_proj = nn.Linear(2 * hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, hidden, bias=False)


class Mlp(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Midlayer(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)


class Eagle3Draft(nn.Module):
    """The draft without its embedding (the target's, frozen and shared) and without attention's bookkeeping, which
    differs between the unrolled training step (unroll.py) and decoding; both are made of the methods below."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        aux_size = len(config.aux_layers) * config.hidden_size
        if config.fc_norm:
            norms = [nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in config.aux_layers]
            self.fc_norm = nn.ModuleList(norms)
        if config.norm_before_fc:
            self.input_norm = nn.RMSNorm(aux_size, eps=config.rms_norm_eps)
        self.fc = nn.Linear(aux_size, config.hidden_size, bias=False)
        self.midlayer = Midlayer(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary = Rotary(config)

    @torch.no_grad()
    def initialise(self, head: TargetHead, kept_D: Tensor, seed: int) -> None:
        """Seeded normal weights; the head starts as the target's own rows, which is where it would be led anyway."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        self.lm_head.weight.copy_(head.head_VH[kept_D])

    def fuse(self, aux_TA: Tensor) -> Tensor:
        """The first step's feature [T, H]."""
        if self.config.norm_before_fc:
            aux_TA = self.input_norm(aux_TA)
        if self.config.fc_norm:
            pieces = aux_TA.chunk(len(self.fc_norm), dim=-1)
            aux_TA = torch.cat([norm(piece) for norm, piece in zip(self.fc_norm, pieces, strict=True)], dim=-1)
        return self.fc(aux_TA)

    def attention_input(self, embedding_RH: Tensor, feature_RH: Tensor) -> Tensor:
        """[R, 2H]"""
        layer = self.midlayer
        return torch.cat([layer.input_layernorm(embedding_RH), layer.hidden_norm(feature_RH)], dim=-1)

    def queries(self, x_R2H: Tensor, positions_R: Tensor) -> Tensor:
        """[R, N, E], rotated"""
        attention = self.midlayer.self_attn
        return self.rotary(attention.q_proj(x_R2H).unflatten(-1, (-1, attention.head_dim)), positions_R)

    def keys_values(self, x_R2H: Tensor, positions_R: Tensor) -> tuple[Tensor, Tensor]:
        """([R, K, E] rotated, [R, K, E])"""
        attention = self.midlayer.self_attn
        keys_RKE = attention.k_proj(x_R2H).unflatten(-1, (-1, attention.head_dim))
        return self.rotary(keys_RKE, positions_R), attention.v_proj(x_R2H).unflatten(-1, (-1, attention.head_dim))

    def finish(self, feature_RH: Tensor, attended_RNE: Tensor) -> Tensor:
        """The layer's output [R, H]: this step's hidden state."""
        hidden_RH = feature_RH + self.midlayer.self_attn.o_proj(attended_RNE.flatten(1))
        return hidden_RH + self.midlayer.mlp(self.midlayer.post_attention_layernorm(hidden_RH))

    def feed_back(self, hidden_RH: Tensor) -> Tensor:
        """The next step's feature [R, H]."""
        return self.norm(hidden_RH) if self.config.norm_output else hidden_RH
