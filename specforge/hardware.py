"""What this machine computes fast."""

from __future__ import annotations

import torch


def compute_dtype(wanted: torch.dtype, device: torch.device | None = None) -> torch.dtype:
    """`wanted`, or float32 on a CPU without instructions for it: there a 16-bit matrix product takes 6 to 150 times as
    long as one in float32. The device is a GPU if there is one, unless it is given."""
    if wanted == torch.float32 or (device.type == "cuda" if device else torch.cuda.is_available()):
        return wanted
    half = wanted == torch.float16
    fast = torch.ops.mkldnn._is_mkldnn_fp16_supported if half else torch.ops.mkldnn._is_mkldnn_bf16_supported
    return wanted if fast() else torch.float32


def described(used: torch.dtype, stored: torch.dtype, device: torch.device | None = None) -> str:
    """The dtype that is used, for the log; with the reason if the machine does not compute `stored` fast."""
    if used == torch.float32 and compute_dtype(stored, device) != stored:
        return f"{name(used)} (this CPU has no {name(stored)} instructions)"
    return name(used)


def name(dtype: torch.dtype) -> str:
    """The name that flags and files use, such as bfloat16."""
    return str(dtype).removeprefix("torch.")
