"""Every SGLang name that we use, in one place. SGLang moves names between releases: a test imports this file."""

from sglang.benchmark import one_batch
from sglang.benchmark.one_batch import TreeCacheNamespace
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.layer_boundary.residual.access import snapshot
from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessor
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
from sglang.srt.layers.quantization.unquant import initialize_bf16_gemm_config
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3
from sglang.srt.runtime_context import SpawnRanks, get_schedule, publish, spawn_world_rank
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

__all__ = [
    "ForwardBatch",
    "ForwardContext",
    "LlamaForCausalLMEagle3",
    "LogitsMetadata",
    "LogitsProcessor",
    "ParallelLMHead",
    "PortArgs",
    "RadixAttention",
    "Req",
    "SamplingParams",
    "ScheduleBatch",
    "ServerArgs",
    "SpawnRanks",
    "SpeculativeAlgorithm",
    "TreeCacheNamespace",
    "VocabParallelEmbedding",
    "forward_context",
    "get_schedule",
    "get_tp_group",
    "initialize_bf16_gemm_config",
    "initialize_fp4_gemm_config",
    "initialize_fp8_gemm_config",
    "initialize_moe_config",
    "one_batch",
    "publish",
    "snapshot",
    "spawn_world_rank",
]
