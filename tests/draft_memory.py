"""A draft step on a device without its target, and counters of the bytes that it keeps and has at once. Imports torch,
specforge.draft and specforge.records."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.draft.step import DraftStep
from specforge.records import FeatureBatch, TargetHead

META = torch.device("meta")
LLAMA_8B = DraftConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    vocab_size=128256,
    draft_vocab_size=32000,
    max_position_embeddings=131072,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    aux_layers=(1, 15, 28),
)


def draft_step(config: DraftConfig, dtype: torch.dtype, device: torch.device = META, steps: int = 7) -> DraftStep:
    size, vocab = config.hidden_size, config.draft_vocab_size
    with device:
        draft = Eagle3Draft(config).to(dtype)
        embedding_VH, head_DH = (torch.zeros(rows, size, dtype=dtype) for rows in (config.vocab_size, vocab))
    head = TargetHead(embedding_VH=embedding_VH, head_VH=head_DH)
    kept_D = torch.arange(vocab)
    step = DraftStep(draft, replace(head, head_VH=torch.empty(config.vocab_size, 1)), kept_D, steps, 0.8)
    step.frozen = (head, head.head_VH, kept_D.to(device), step.frozen[3])
    return step


def supervised_row(
    config: DraftConfig, lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device = META
) -> FeatureBatch:
    """Records whose every token is supervised."""
    total = sum(lengths)
    with device:
        on_device = {
            "token_ids": torch.zeros(total, dtype=torch.int64),
            "positions": torch.zeros(total, dtype=torch.int64),
            "aux": torch.zeros(total, len(config.aux_layers) * config.hidden_size, dtype=dtype),
            "last": torch.zeros(total, config.hidden_size, dtype=dtype),
            "teacher_lse": torch.zeros(total),
        }
    return FeatureBatch(
        sample_ids=tuple(range(len(lengths))),
        lengths=lengths,
        depth=torch.cat([torch.arange(n - 2, -2, -1).clamp(min=0) for n in lengths]),
        teacher_index=torch.arange(total),
        teacher_top1=torch.zeros(total, dtype=torch.int64),
        **on_device,
    )


def tensors_of(batch: FeatureBatch) -> list[Tensor]:
    return [batch.token_ids, batch.positions, batch.aux, batch.last, batch.teacher_lse]


def kept_bytes(function: Callable[[], Any], excluded: Iterable[Tensor] = ()) -> int:
    """What autograd keeps of `function`, each storage once, but for those of `excluded`."""
    known = {x.untyped_storage()._cdata for x in excluded}
    found = []  # keeps the storages alive: no two have one address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            found.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in found)


class Alive(TorchDispatchMode):
    """Bytes on the meta device that operators made inside and that are still there, and the most at any time."""

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        """`before`: tensors that are there already, and do not count."""
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, object] = {x.untyped_storage()._cdata: None for x in before}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device == META:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, rstd)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


@contextmanager
def norms_of_a_gpu() -> Iterator[None]:
    """There torch's RMSNorm is one operator, `_fused_rms_norm`, which keeps its input and one number a row
    (derivatives.yaml); on the meta device it is several, which keep their results in fp32 too."""
    before = nn.RMSNorm.forward
    nn.RMSNorm.forward = lambda self, x: _Norm.apply(x, self.weight)
    try:
        yield
    finally:
        nn.RMSNorm.forward = before
