"""Tiny random targets with a real tokenizer and chat template, and tiny conversations. Made anew for each test run."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Each with what makes it different: multipliers and scales that are 1 by default would hide a wrong one.
FAMILIES: dict[str, tuple[type, type, dict[str, object]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 0.25},
    ),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "sliding_window": 48,
            "query_pre_attn_scalar": 32,
            "final_logit_softcapping": 2.0,
            "tie_word_embeddings": True,
        },
    ),
}
DENSE_LLAMA4 = {  # SGLang has no such experts on a CPU
    "intermediate_size_mlp": 256,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 100,
    "moe_layers": [],
    "attention_chunk_size": 64,
}
LLAMA4 = (Llama4TextConfig, Llama4ForCausalLM, DENSE_LLAMA4)
WRAPPED = {  # language models inside multimodal ones: `make_wrapped`
    "gemma3_vision": (Gemma3Config, "Gemma3ForConditionalGeneration"),
    "llama4_vision": (Llama4Config, "Llama4ForConditionalGeneration"),
}
WORDS = "the a one two red blue cat dog house tree runs sees likes big small and then why how yes no maybe".split()


def sentence(source: random.Random, length: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(length)) + "."


def conversations(count: int, seed: int = 0, turns: int = 2) -> list[dict[str, object]]:
    source = random.Random(seed)
    rows = []
    for number in range(count):
        messages = []
        for _ in range(turns):
            messages.append({"role": "user", "content": sentence(source, source.randint(3, 9))})
            messages.append({"role": "assistant", "content": sentence(source, source.randint(4, 20))})
        rows.append({"id": f"row-{number}", "conversations": messages})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_token_rows(folder: Path, train: int, test: int) -> None:
    """Writes train.jsonl and test.jsonl with that many rows of 40 tokens, 32 of them supervised."""
    folder.mkdir()
    for split, count in (("train", train), ("test", test)):
        rows = [
            {"id": str(n), "input_ids": [3 + (7 * n + at) % 200 for at in range(40)], "loss_mask": [0] * 8 + [1] * 32}
            for n in range(count)
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)


def tokenizer(
    *more_special: str, plain: Sequence[str] = (), more_text: Sequence[str] = (), split: str = "", **settings: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML's special tokens and `more_special`, and added tokens that are not special; trained
    on `more_text`, too. `split`: a pattern of pieces in place of GPT-2's. `settings` as eos_token, chat_template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split:
        pieces = pre_tokenizers.Split(Regex(split), "isolated")
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_alone])
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more_special]
    trainer = trainers.BpeTrainer(
        vocab_size=397 + len(special),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [sentence(random.Random(n), 20) for n in range(50)] + ["user assistant system", *more_text]
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(text, special=True) for text in special])
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML} | settings
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **named)


def make_target(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 0.1,
    shard_size: str = "5GB",
    **settings: object,
) -> Path:
    """A random model of 8 layers. With the default spread its greedy choices are far from ties; with the usual 0.02,
    rounding grows as it does in trained models. `settings` override the config."""
    if family in WRAPPED:
        return make_wrapped(folder, family, dtype, seed=seed, spread=spread)
    own = tokenizer()
    config_class, model_class, special = (FAMILIES | {"llama4": LLAMA4})[family]
    usual = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "initializer_range": spread,
        "eos_token_id": own.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": own.pad_token_id,
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**(usual | special | settings)))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    own.save_pretrained(folder)
    return folder


def make_wrapped(folder: Path, family: str, dtype: torch.dtype, **given: Any) -> Path:
    """A language model with a vision tower of as many layers, whose weights are left out: nothing here looks at
    pictures. `folder`/text holds the language model alone."""
    base, (config_class, architecture) = family.removesuffix("_vision"), WRAPPED[family]
    text = make_target(folder / "text", base, dtype, **given)
    named = load_file(text / "model.safetensors")
    save_file({f"language_model.{name}": tensor for name, tensor in named.items()}, folder / "model.safetensors")
    tower = {"num_hidden_layers": 8, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}
    config_class(
        text_config=json.loads((text / "config.json").read_text()),
        vision_config=tower | {"image_size": 56, "patch_size": 14},
        boi_token_index=500,
        eoi_token_index=501,
        image_token_index=502,
        architectures=[architecture],
        dtype=dtype,
    ).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def make_talker(folder: Path, seed: int = 0) -> Path:
    """A target whose answers are words, up to its end of turn (after 1 to 40 of them, when greedy); a few answers hold
    another special token. All other rows of its head are zero."""
    make_target(folder, seed=seed)
    vocabulary = tokenizer().get_vocab()
    content = load_file(folder / "model.safetensors")
    head_VH = content["lm_head.weight"]
    share = {"<|im_end|>": 6.0, "<|endoftext|>": 2.5} | {f"\u0120{word}": 5.0 for word in WORDS}
    content["lm_head.weight"] = torch.zeros_like(head_VH)
    for token, scale in share.items():
        if token in vocabulary:
            content["lm_head.weight"][vocabulary[token]] = scale * head_VH[vocabulary[token]]
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
