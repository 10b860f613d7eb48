"""Made-up drafts, packed rows and targets. Imports the draft's mathematics alone, as benchmarks/gpu.py wants it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specforge.alignment import teacher_rows
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.draft.step import DraftStep
from specforge.records import Example, FeatureRecord, TargetHead

STEPS, DECAY = 7, 0.8
SPREAD = 0.05  # of the made-up target's weights
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The draft and the packed row of a check."""

    config: DraftConfig
    lengths: tuple[int, ...]  # tokens of each record
    turn: int  # tokens of a user's and an assistant's turn together
    share: float = 0.5  # of a turn, supervised


def draft_config(
    hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, draft_vocab: int
) -> DraftConfig:
    return DraftConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        rms_norm_eps=1e-5,
        vocab_size=vocab,
        draft_vocab_size=draft_vocab,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        aux_layers=(1, 3, 5),
    )


SIZE = Size(config=draft_config(512, 1024, 8, 2, 4096, 2048), lengths=(300, 1, 700, 33), turn=64)
MEMORY_SIZE = Size(config=draft_config(2048, 8192, 16, 4, 32000, 16000), lengths=(2048,), turn=2048, share=1.0)


def made_up(size: Size, device: torch.device = CPU) -> tuple[TargetHead, Tensor, list[FeatureRecord]]:
    """(head, kept_D, records) with random fp32 states on `device`; what belongs on the host is there."""
    config, random = size.config, torch.Generator(device).manual_seed(0)
    hidden, vocab = config.hidden_size, config.vocab_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    head = TargetHead(embedding_VH=normal(vocab, hidden), head_VH=normal(vocab, hidden) * hidden**-0.5)
    kept_D = torch.randperm(vocab, generator=random, device=device)[: config.draft_vocab_size].sort().values
    records = []
    for number, length in enumerate(size.lengths):
        mask_T = torch.arange(length) % size.turn >= round(size.turn * (1 - size.share))
        rows_S = torch.from_numpy(teacher_rows(mask_T.numpy()))
        last_SH = normal(len(rows_S), hidden)
        teacher = [(x.argmax(-1), x.logsumexp(-1)) for x in (head.logits(part) for part in last_SH.split(1024))]
        records.append(
            FeatureRecord(
                sample_id=number,
                token_ids=torch.randint(vocab, (length,), generator=random, device=device).int().cpu(),
                loss_mask=mask_T,
                aux=normal(length, len(config.aux_layers) * hidden),
                last=last_SH,
                teacher_top1=torch.cat([top1 for top1, _ in teacher]).int().cpu(),
                teacher_lse=torch.cat([lse for _, lse in teacher]),
            )
        )
    return head, kept_D, records


def draft_step(size: Size, head: TargetHead, kept_D: Tensor, device: torch.device, dtype: torch.dtype) -> DraftStep:
    """The same weights whatever the device: fp32, seeded. The target's own tensors are in `dtype`."""
    draft = Eagle3Draft(size.config)
    draft.initialise(TargetHead(embedding_VH=head.embedding_VH, head_VH=head.head_VH.cpu()), kept_D.cpu(), seed=0)
    tensors = {name: getattr(head, name).to(device, dtype) for name in ("embedding_VH", "head_VH")}
    return DraftStep(draft.to(device), replace(head, **tensors), kept_D.to(device), STEPS, DECAY)


def random_examples(vocab_size: int, lengths: Sequence[int] = (5, 64, 200, 33)) -> list[Example]:
    random, found = np.random.default_rng(0), []
    for number, length in enumerate(lengths):
        mask_T = np.arange(length) >= length // 3
        ids_T = random.integers(3, vocab_size, length).astype(np.int32)
        found.append(Example(sample_id=number, token_ids=ids_T, loss_mask=mask_T))
    return found


def make_target(folder: Path, dtype: torch.dtype, size: DraftConfig = SIZE.config, layers: int = 8) -> Path:
    """A random Llama without a tokenizer, of the draft's size. Its weights are so large that its greedy choices are far
    from ties."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim rms_norm_eps"
    shape = {name: getattr(size, name) for name in names.split()}
    shape |= {"max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(**shape, num_hidden_layers=layers, initializer_range=SPREAD)
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder
