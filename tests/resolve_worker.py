"""Resolves the data sets of its arguments in a process of its own, as a command does: huggingface_hub reads HF_ENDPOINT
and HF_HOME once, when it is imported. The last line is the result; a SpecforgeError ends it as it ends a command."""

from __future__ import annotations

import json
import sys

from specforge import cli
from specforge.data.lines import lines
from specforge.data.sources import resolve
from specforge.errors import SpecforgeError

if __name__ == "__main__":
    try:
        sources = resolve(sys.argv[1:])
    except SpecforgeError as error:
        sys.exit(cli.fail(error))
    shown = [
        {
            "name": source.name,
            "files": [str(file) for file in source.files],
            "weight": source.weight,
            "origin": source.origin,
            "cached": source.cached,
            "rows": [json.loads(value) for file in source.files for _, value in lines(file) if value is not None],
        }
        for source in sources
    ]
    print(json.dumps(shown))
