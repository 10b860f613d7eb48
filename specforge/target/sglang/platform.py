"""SGLang's plugin entry (group `sglang.srt.platforms`): lets it run on a CPU without its own kernels."""

from __future__ import annotations


def activate() -> str | None:
    """The platform class for SGLang, or None where an accelerator is present."""
    import torch

    return None if torch.cuda.is_available() else "specforge.target.sglang.cpu_platform:TorchCpuPlatform"
