"""Run by test_sglang.py: our settings as SGLang resolves them on a Hopper GPU, for many families. Needs no GPU, for the
resolution asks the platform for its facts, and no weights. Prints one JSON object.

settings_worker.py FOLDER"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import override_platform
from transformers import DeepseekV3Config, Gemma3TextConfig, Glm4MoeConfig, GptOssConfig, LlamaConfig, Qwen3MoeConfig

from specforge.records import Ranks
from specforge.target.sglang import engine

HOPPER = {
    "is_cuda": True,
    "is_sm90": True,
    "is_sm100": False,
    "is_blackwell": False,
    "is_hopper_with_cuda_12_3": True,
    "has_flashinfer": True,
    "device_sm": 90,
    "device_capability": (9, 0),
}
FAMILIES = {
    "LlamaForCausalLM": LlamaConfig,
    "Gemma3ForCausalLM": Gemma3TextConfig,
    "Qwen3MoeForCausalLM": Qwen3MoeConfig,
    "GptOssForCausalLM": GptOssConfig,
    "DeepseekV3ForCausalLM": DeepseekV3Config,
    "Glm4MoeForCausalLM": Glm4MoeConfig,
}


def resolved(args: Any) -> dict[str, Any]:
    with override_platform(**HOPPER):
        args.resolve_once()
    found = args.resolved_dict()
    graphs = {phase: graph["backend"] for phase, graph in found["cuda_graph_config"].items()}
    wanted = ("attention_backend", "page_size", "flashinfer_allreduce_fusion_backend", "disable_radix_cache")
    return {name: found[name] for name in (*wanted, "chunked_prefill_size")} | {"graphs": graphs}


def main() -> None:
    type(current_platform).is_out_of_tree = lambda self: False
    ranks, found = Ranks(rank=0, world=2, tp_size=2, device=torch.device("cuda", 0)), {}
    for architecture, config in FAMILIES.items():
        folder = Path(sys.argv[1]) / architecture
        made = config(architectures=[architecture])
        made.save_pretrained(folder)
        info = SimpleNamespace(path=str(folder), config=made.to_dict())
        for dtype in (torch.bfloat16, torch.float32):
            args = engine.server_args(info, ranks, dtype, 1024, 0.7)
            found[f"{architecture} {dtype}"] = resolved(args)
        fused = engine.server_args(info, ranks, torch.bfloat16, 1024, 0.7)
        fused.enforce_disable_flashinfer_allreduce_fusion = False
        found[f"{architecture} fused"] = resolved(fused)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
