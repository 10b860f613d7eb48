"""How hidden states become bytes. A codec's name stands in the manifest."""

from __future__ import annotations

import torch
from torch import Tensor

CODECS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def codec_for(dtype: torch.dtype) -> str:
    """bf16, but fp32 for a target that runs in fp32 (fp16 states may exceed bf16's precision, never its range)."""
    return "fp32" if dtype == torch.float32 else "bf16"


def encode(codec: str, states: Tensor) -> Tensor:
    return states.to("cpu", CODECS[codec]).contiguous()
