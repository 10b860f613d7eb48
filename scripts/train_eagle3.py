"""The historical command. `specforge train --online` is the same with more settings.

deepspeed scripts/train_eagle3.py --deepspeed_config ds_config.json \
    [--basepath M --cache_dir C --savedir S --trainpath A --testpath B]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from specforge import cli, config


def mix(output: Path, model_path: str, max_length: int) -> int:
    """The mixed data set, made by the first rank while the others wait for the file that it writes last."""
    given = {"dataset": ("mix",), "model_path": model_path, "max_length": max_length, "output": output}
    if int(os.environ.get("RANK", "0")) == 0:
        return cli.execute("prepare-data", config.PrepareDataSettings, given)
    while not (output / "train.jsonl").exists():
        time.sleep(1)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", type=Path, default=Path("ds_config.json"))
    parser.add_argument("--basepath", default="meta-llama/Llama-3.1-8B-Instruct", help="the target")
    parser.add_argument("--cache_dir", type=Path, default=Path("./data_cache"), help="where prepared data lies")
    parser.add_argument("--savedir", type=Path, default=Path("./checkpoints"))
    parser.add_argument("--trainpath", type=Path, help="JSONL (default: ultrachat and sharegpt, made in cache_dir)")
    parser.add_argument("--testpath", type=Path, help="JSONL (default: every 20th training row is held out)")
    parser.add_argument("--local_rank", type=int, default=0, help="given by deepspeed")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", default="auto")
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--draft_vocab_size", type=int, default=32000)
    options = parser.parse_args()
    os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    mixed = options.cache_dir / "mix"
    given = {
        "online": True,
        "model_path": options.basepath,
        "data": options.trainpath or mixed,
        "test_data": options.testpath,
        "output": options.savedir,
        "deepspeed_config": options.deepspeed_config,
        "epochs": options.epochs,
        "lr": options.lr,
        "max_length": options.max_length,
        "row_tokens": options.max_length,
        "batch_size": cli.world_size(),
        "draft_vocab_size": options.draft_vocab_size,
    }
    if options.trainpath is None:
        code = mix(mixed, options.basepath, options.max_length)
        if code:
            return code
    return cli.execute("train", config.TrainSettings, given)


if __name__ == "__main__":
    cli.leave(main())
