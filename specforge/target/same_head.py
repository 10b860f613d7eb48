"""Whether the engine runs with the embedding and the head that training reads from the target's files.

They are compared at rows sampled over the whole vocabulary. Another file, a stale one or another module's, is then
found before anything is captured: a draft would learn from one head and be judged by another."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from specforge.errors import EngineError
from specforge.records import TargetInfo
from specforge.target.weights import sample_head

ROWS, STATES = 64, 8
# Of what a row is long, or its logits for all states. A bf16 engine is off by 0.004, another row by about 1.4
# (tests/unit/test_same_head.py).
TOLERANCE = 0.1
FIX = "keep in the folder only the weights that belong to the model (its index names them), or fetch the target again"


def sampled(vocab_size: int) -> Tensor:
    """[n] token ids from the first to the last, evenly spaced."""
    return torch.linspace(0, vocab_size - 1, min(ROWS, vocab_size)).round().long()


def check(
    info: TargetInfo, embedding_nH: Tensor | None, last_kH: Tensor, logits_kV: Tensor, capped: bool = True
) -> None:
    """`embedding_nH`: the engine's rows for `sampled` tokens, up to a factor; None if it does not tell them. `last_kH`:
    STATES states behind the final norm, and `logits_kV` what the engine makes of them. Raises EngineError if a row is
    another one."""
    ids_n = sampled(info.vocab_size)
    head = sample_head(info, ids_n)
    if embedding_nH is not None:
        theirs_nH, own_nH = embedding_nH.float().cpu().nan_to_num(), head.embedding_VH.nan_to_num()
        factor = (theirs_nH * own_nH).sum() / own_nH.square().sum().clamp_min(1e-30)  # some models scale what they read
        _compare("embedding", info, ids_n, theirs_nH, factor.abs() * own_nH)
    head = head if capped else replace(head, softcap=None)
    own_kn, theirs_kn = head.logits(last_kH.float().cpu()), logits_kV[:, ids_n.to(logits_kV.device)].float().cpu()
    _compare("output head", info, ids_n, theirs_kn.T, own_kn.T)


def _compare(what: str, info: TargetInfo, ids_n: Tensor, theirs_nX: Tensor, own_nX: Tensor) -> None:
    long_n = own_nX.norm(dim=1)
    off_n = (theirs_nX - own_nX).norm(dim=1) / long_n.clamp_min(float(long_n.mean()) / 2 + 1e-30)
    wrong_n = ~(off_n < TOLERANCE)
    if wrong_n.any():
        raise EngineError(
            f"the engine's {what} is not the one in the target's files (first seen at token {int(ids_n[wrong_n][0])})",
            where=info.path,
            fix=FIX,
        )
