"""SGLang's own draft class beside the target that runs already: what a server will make of a draft folder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from specforge.records import FeatureRecord
from specforge.target.sglang import names as sgl
from specforge.target.sglang.engine import SglangEngine

SAME = ("num_attention_heads", "num_key_value_heads", "head_dim")


class SglangJudge:
    """DraftJudge. Shares the target's embedding, attention backend and KV pool, as SGLang's draft worker does; the
    calls stand in its order. Use it between the engine's passes: the pools are cleared after each call."""

    def __init__(self, engine: SglangEngine, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """`config` and `tensors` in the layout that SGLang loads; the weights are cast to the target's dtype."""
        self._engine, self._vocabulary = engine, int(config["draft_vocab_size"])
        usual = torch.get_default_dtype()
        torch.set_default_dtype(engine.dtype)
        try:
            with torch.device(engine.device):
                self._draft = sgl.LlamaForCausalLMEagle3(LlamaConfig.from_dict(config)).eval()
        finally:
            torch.set_default_dtype(usual)
        self._draft.load_weights(iter(tensors.items()))
        self._draft.set_embed(engine._runner.model.get_embed_and_head()[0])

    @torch.no_grad()
    def logits(self, record: FeatureRecord) -> Tensor:
        engine, runner = self._engine, self._engine._runner
        engine._hook.rows = None  # the target only makes room in the pools
        batch, _ = engine._extend([record.token_ids.tolist()])
        forward = sgl.ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
        with sgl.forward_context(sgl.ForwardContext(attn_backend=runner.attn_backend)):
            runner.attn_backend.init_forward_metadata(forward)
            forward.spec_info = SimpleNamespace(hidden_states=record.aux.to(engine.device, engine.dtype))
            hidden, _ = self._draft.model(torch.roll(forward.input_ids, -1), forward.positions, forward)
        forward.spec_info = None
        metadata = sgl.LogitsMetadata.from_forward_batch(forward)
        processor = self._draft.logits_processor
        logits = processor._get_logits(hidden, self._draft.lm_head, metadata, use_logits_buffer=False)
        engine._clear()
        return logits[:, : self._vocabulary].float()


def unfit(engine: SglangEngine, config: dict[str, Any]) -> str | None:
    """Why the draft cannot run in the target's pools, or None."""
    if not engine.serves_eagle3:
        return f"SGLang has no EAGLE-3 for {engine.info.config.get('model_type')}"
    own = engine.info.config
    heads = int(str(own["num_attention_heads"]))
    its = (
        heads,
        own.get("num_key_value_heads") or heads,
        own.get("head_dim") or engine.info.hidden_size // heads,
    )
    if its != tuple(config[name] for name in SAME):
        return "the draft's heads are not shaped like the target's, whose KV pool it would share here"
    return None


def read_layers(engine: SglangEngine, layers: tuple[int, ...]) -> bool:
    """Captures these layers from now on; False for a model that is read through hooks."""
    if engine.serves_eagle3:
        model = engine._runner.model
        for module in model.modules():  # some models add the new layers to those that are marked (Qwen2-MoE, MiniMax)
            if getattr(module, "_is_layer_to_capture", False):
                module._is_layer_to_capture = False
        model.set_eagle3_layers_to_capture(list(layers))
        engine.aux_layers = layers
    return engine.serves_eagle3
