"""The historical command.

python scripts/example_usage.py --example check        what `specforge doctor` says
python scripts/example_usage.py --example download     fetches the default target from the hub
"""

from __future__ import annotations

import argparse
import sys

from specforge import cli, config
from specforge.errors import SpecforgeError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", choices=("check", "download"), required=True)
    parser.add_argument("--model-path", default="meta-llama/Llama-3.1-8B-Instruct", help="for download")
    options = parser.parse_args()
    if options.example == "check":
        return cli.execute("doctor", config.DoctorSettings, {})
    from specforge.target.weights import resolve

    try:
        print(resolve(options.model_path))
    except SpecforgeError as error:
        return cli.fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
