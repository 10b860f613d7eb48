"""specforge: train EAGLE-3 draft models on the hidden states of the engine that will serve them."""

from __future__ import annotations

import importlib.abc
import os
import sys
from types import ModuleType

__version__ = "0.1.0"


class _TorchvisionOnCpu(importlib.abc.MetaPathFinder):
    """Lets torchvision's CUDA wheel be imported beside a torch without CUDA (SGLang and transformers import it).

    Its import registers fake kernels for two operators that its library could not load; their schemas are enough."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _kept.append(library)


_kept: list[object] = []  # a library's schemas live as long as the object
sys.meta_path.insert(0, _TorchvisionOnCpu())
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # fp32 products on a CPU repeat to the last bit (benchmarks/LOG.md)
os.environ.setdefault("MKL_DYNAMIC", "FALSE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes of a run are forked after tokenizing
