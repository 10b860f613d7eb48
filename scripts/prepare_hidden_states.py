"""The historical command. `specforge prepare-hidden` is the same and starts its ranks itself.

torchrun --nproc_per_node=N scripts/prepare_hidden_states.py --model-path M --enable-aux-hidden-states --data-path D \
    --chat-template llama3 --max-length 2048 --tp-size N --batch-size 4 --mem-frac=0.75 --num-samples 1000

The chat template is the target's own, whatever short name is given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from specforge import cli, config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--enable-aux-hidden-states", action="store_true", help="always on")
    parser.add_argument("--data-path", type=Path, required=True)
    parser.add_argument("--output-path", type=Path, default=Path("cache/hidden_states"))
    parser.add_argument("--chat-template", help="a Jinja file; a short name only says which family the target is")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4, help="conversations of full length in one pass")
    parser.add_argument("--mem-frac", type=float, default=0.75)
    parser.add_argument("--num-samples", type=int)
    options = parser.parse_args()
    given = {
        "model_path": options.model_path,
        "data": options.data_path,
        "output": options.output_path,
        "chat_template": cli.own_template(options.chat_template),
        "max_length": options.max_length,
        "tp_size": options.tp_size,
        "tokens_per_batch": options.batch_size * options.max_length,
        "mem_frac": options.mem_frac,
        "num_samples": options.num_samples,
    }
    return cli.execute("prepare-hidden", config.PrepareHiddenSettings, given)


if __name__ == "__main__":
    cli.leave(main())
