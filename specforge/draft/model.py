"""The draft model. Its parameters carry the names that they have on disk.

    feature_TH = fc(aux_TA)                                   three aux states of the target, fused
    x = cat(input_layernorm(embedding), hidden_norm(feature)) -> q, k, v      (2H in, so any EAGLE-3 server's layout)
    h = feature + o_proj(attention);  h = h + mlp(post_attention_layernorm(h))
    logits = lm_head(norm(h));        the next step's feature is h itself, before `norm`

Source: EAGLE-3 (Li et al., 2025), and the draft class of the servers that load the folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specforge.records import TargetHead, TargetInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """The draft's shape. Sizes are in elements; the rest is inherited from the target."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    vocab_size: int  # of the target
    draft_vocab_size: int
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    aux_layers: tuple[int, ...]  # id k: output of layer k
    target_fingerprint: str = ""
    token_ids: dict[str, int] = field(default_factory=dict)  # bos_token_id, eos_token_id

    @classmethod
    def for_target(
        cls, info: TargetInfo, aux_layers: tuple[int, ...], draft_vocab_size: int, intermediate_size: int | None = None
    ) -> DraftConfig:
        config: dict[str, Any] = info.config
        heads = int(config["num_attention_heads"])
        rope = dict(config.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10000.0})
        if "rope_theta" not in rope:  # one set of parameters for each kind of layer: the draft's attends to everything
            rope = dict(rope["full_attention"])
        ids = {name: config.get(name) for name in ("bos_token_id", "eos_token_id")}
        return cls(
            hidden_size=info.hidden_size,
            intermediate_size=intermediate_size or int(config.get("intermediate_size") or 4 * info.hidden_size),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or info.hidden_size // heads),
            rms_norm_eps=float(config.get("rms_norm_eps") or 1e-5),
            vocab_size=info.vocab_size,
            draft_vocab_size=min(draft_vocab_size, info.vocab_size),
            max_position_embeddings=int(config.get("max_position_embeddings") or 2048),
            rope_parameters=rope,
            aux_layers=aux_layers,
            target_fingerprint=info.fingerprint,
            token_ids={name: value for name, value in ids.items() if isinstance(value, int)},
        )


class Rotary:
    """The target's rotary embedding in fp32. No module: a cast of the draft to bf16 must not reach its frequencies."""

    def __init__(self, config: DraftConfig) -> None:
        llama = LlamaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
        self._rotary = LlamaRotaryEmbedding(llama)

    def __call__(self, x_RnE: Tensor, positions_R: Tensor) -> Tensor:
        """Rotates each head of x at its row's position."""
        rotary = self._rotary.to(x_RnE.device)
        cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=x_RnE.device), positions_R[None])
        first, second = x_RnE.float().chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return (x_RnE.float() * cos[0, :, None] + turned * sin[0, :, None]).to(x_RnE.dtype)


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
        self.fc = nn.Linear(len(config.aux_layers) * config.hidden_size, config.hidden_size, bias=False)
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
        """The layer's output [R, H]: this step's hidden state and the next step's feature."""
        hidden_RH = feature_RH + self.midlayer.self_attn.o_proj(attended_RNE.flatten(1))
        return hidden_RH + self.midlayer.mlp(self.midlayer.post_attention_layernorm(hidden_RH))
