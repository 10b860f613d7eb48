"""The historical command. `specforge prepare-data` is the same with more to say.

python scripts/prepare_data.py --dataset ultrachat | sharegpt | FILE.jsonl [--output-path FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from specforge import cli, config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output-path", type=Path)
    options = parser.parse_args()
    given = {"dataset": (options.dataset,)} | ({"output": options.output_path} if options.output_path else {})
    return cli.execute("prepare-data", config.PrepareDataSettings, given)


if __name__ == "__main__":
    sys.exit(main())
