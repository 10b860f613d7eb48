"""The historical command. `specforge train --online` is the same and starts its ranks itself.

torchrun --standalone --nproc_per_node N scripts/train_eagle3_online.py --target-model-path M --is-preformatted \
    --chat-template qwen --train-data-path F [--eval-data-path G] --output-dir O --num-epochs 10 ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

from specforge import cli, config

DS_CONFIG = Path(__file__).parent.parent / "ds_config.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-model-path", "--model-path", dest="model_path", required=True)
    parser.add_argument("--train-data-path", type=Path, required=True, help="conversations, or text with a template")
    parser.add_argument("--eval-data-path", type=Path)
    parser.add_argument("--is-preformatted", action="store_true", help="rows are {id, text}")
    parser.add_argument("--chat-template", help="a Jinja file; a short name only says which family the target is")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/draft"))
    parser.add_argument("--num-epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=1, help="packed rows on each rank in an optimizer step")
    parser.add_argument("--learning-rate", default="auto")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--ttt-length", type=int, default=7)
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--mem-frac", type=float, default=0.75)
    parser.add_argument("--draft-vocab-size", type=int, default=32000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    given = {
        "online": True,
        "model_path": options.model_path,
        "data": options.train_data_path,
        "test_data": options.eval_data_path,
        "chat_template": cli.own_template(options.chat_template),
        "is_preformatted": options.is_preformatted,
        "output": options.output_dir,
        "epochs": options.num_epochs,
        "batch_size": options.batch_size * cli.world_size(),
        "lr": options.learning_rate,
        "max_length": options.max_length,
        "row_tokens": options.max_length,
        "steps": options.ttt_length,
        "tp_size": options.tp_size,
        "mem_frac": options.mem_frac,
        "draft_vocab_size": options.draft_vocab_size,
        "seed": options.seed,
        "deepspeed_config": DS_CONFIG,
    }
    return cli.execute("train", config.TrainSettings, given)


if __name__ == "__main__":
    cli.leave(main())
