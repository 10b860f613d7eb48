"""Run by test_sglang.py: SGLang's own draft class loads a folder that we wrote, and is fed by its own target with the
states just captured; its logits are compared with our unrolled step 0. Prints one JSON line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig

from specforge import launch
from specforge.config import EngineSettings
from specforge.draft import folder as draft_folder
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.draft.unroll import unroll
from specforge.records import Example, FeatureBatch
from specforge.target import engine as engines
from specforge.target import weights


def main() -> None:
    target, folder, norms = Path(sys.argv[1]), Path(sys.argv[2]), dict.fromkeys(sys.argv[3:], True)
    ranks = launch.join(1)
    info = weights.describe(str(target))
    engine = engines.load(EngineSettings(engine="sglang", tokens_per_batch=1024, dtype="bfloat16"), info, ranks)
    head = weights.load_head(info, torch.bfloat16)
    kept = torch.arange(0, info.vocab_size, 2)
    draft = Eagle3Draft(DraftConfig.for_target(info, engine.aux_layers, len(kept), **norms))
    draft.initialise(head, kept, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # norms that are all one would be missed by nobody
        for parameter in draft.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    draft_folder.save(folder, draft, kept, draft.state_dict(), torch.bfloat16)
    draft, _ = draft_folder.load(folder, torch.bfloat16)

    ids = np.random.default_rng(0).integers(3, info.vocab_size, 80).astype(np.int32)
    example = Example(sample_id=0, token_ids=ids, loss_mask=np.ones(len(ids), dtype=np.bool_))
    theirs = sglang_logits(engine, folder, example)
    with torch.no_grad():
        batch = FeatureBatch.pack(engine.capture([example]), ranks.device, torch.bfloat16)
        step = unroll(draft, head.embedding_VH, batch, 1)[0]
        ours = draft.lm_head(draft.norm(step.hidden_RH)).float()
        shifted = theirs[step.rows_R + 1]
        theirs = theirs[step.rows_R]
    result = {
        "apart": float((ours - theirs).norm() / theirs.norm()),
        "apart_if_shifted": float((ours - shifted).norm() / shifted.norm()),
        "top1": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }
    print(json.dumps(result), flush=True)


@torch.no_grad()
def sglang_logits(engine, folder: Path, example: Example) -> torch.Tensor:
    """[T, draft vocabulary], in the order of calls of SGLang's draft worker."""
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
    from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3

    runner = engine._runner
    torch.set_default_dtype(torch.bfloat16)
    judge = LlamaForCausalLMEagle3(AutoConfig.from_pretrained(folder)).eval()
    torch.set_default_dtype(torch.float32)
    judge.load_weights(iter(load_file(folder / "model.safetensors").items()))
    judge.model.embed_tokens.weight.data.copy_(runner.model.model.embed_tokens.weight.data)
    target_forward, seen = runner.forward, {}

    def forward(batch, *args, **kwargs):
        output = target_forward(batch, *args, **kwargs)
        batch.spec_info = SimpleNamespace(hidden_states=engine._hook.aux)
        with forward_context(ForwardContext(attn_backend=runner.attn_backend)):
            hidden, _ = judge.model(torch.roll(batch.input_ids, -1), batch.positions, batch)
        batch.spec_info = None
        seen["logits"] = F.linear(hidden, judge.lm_head.weight).float()
        return output

    runner.forward = forward
    engine.capture([example])
    runner.forward = target_forward
    return seen["logits"]


if __name__ == "__main__":
    main()
