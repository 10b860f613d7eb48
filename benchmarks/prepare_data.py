"""Speed and memory of `specforge prepare-data`, and of the same tokens and masks made through `datasets.map`.

    python benchmarks/prepare_data.py --model-path cache/models/SmolLM2-135M-Instruct [--conversations 200000]

The conversations are random words of the example conversations, three exchanges of about 5 KB together, so 200,000 are
1 GB. Memory is the sum over the command and its workers of the proportional set size, sampled every 0.2 s."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from datasets import Dataset

from specforge.config import DataSettings
from specforge.data.formats import to_conversation
from specforge.data.tokenize import ChatTokenizer

ROOT = Path(__file__).parent.parent
COMPARED = 2000  # conversations for the comparison with datasets.map, in one process each
ROUNDS = 3


def write_rows(path: Path, count: int) -> None:
    words = re.findall(r"\S+", (ROOT / "examples" / "conversations.jsonl").read_text(encoding="utf-8"))
    source = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = []
            for _ in range(3):
                turns.append({"role": "user", "content": " ".join(source.choices(words, k=60))})
                turns.append(
                    {"role": "assistant", "content": " ".join(source.choices(words, k=source.randint(100, 300)))}
                )
            file.write(json.dumps({"id": str(number), "conversations": turns}) + "\n")


def memory(pid: int) -> int:
    """Bytes of a process and all that it started; pages that they share count once."""
    total = 0
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total = int(re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)[1]) * 1024
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += sum(map(memory, map(int, (thread / "children").read_text().split())))
    except OSError:
        pass  # it has just ended
    return total


def whole_command(rows: Path, model: str, output: Path, workers: int) -> dict[str, float]:
    arguments = ["--dataset", rows, "--model-path", model, "--output", output, "--workers", workers]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "specforge.cli", "prepare-data", *map(str, arguments)], cwd=ROOT)
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.2)
    seconds = time.perf_counter() - began
    assert process.returncode == 0
    report = json.loads((output / "report.json").read_text())
    tokens = report["train"]["tokens"] + report["test"]["tokens"]
    return {
        "workers": workers,
        "seconds": round(seconds, 1),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds),
        "peak_memory_mb": round(peak / 1e6),
        "input_mb": round(rows.stat().st_size / 1e6),
    }


def against_datasets(rows: Path, model: str) -> dict[str, object]:
    """Tokens and masks of the same conversations in one process: `datasets.map`, which renders and tokenizes and makes
    no mask (the template states none), and ours, which renders each turn twice, as its prompt and as the last turn."""
    chat = ChatTokenizer(model)
    with rows.open(encoding="utf-8") as file:
        found = [json.loads(line) for line, _ in zip(file, range(COMPARED), strict=False)]
    plain = Dataset.from_list(found)
    conversations = [to_conversation(row, "") for row in found]
    rules, seconds, tokens = DataSettings(max_length=1 << 20), {"datasets.map": [], "ours": []}, 0

    def tokenized(batch: dict[str, list]) -> dict[str, list]:
        texts = [chat.tokenizer.apply_chat_template(turns, tokenize=False) for turns in batch["conversations"]]
        return {"input_ids": chat.tokenizer(texts, add_special_tokens=False)["input_ids"]}

    for number in range(ROUNDS):
        began = time.perf_counter()
        plain.map(tokenized, batched=True, batch_size=256, load_from_cache_file=False, new_fingerprint=f"round{number}")
        seconds["datasets.map"].append(time.perf_counter() - began)
        began = time.perf_counter()
        masked = [one for at in range(0, COMPARED, 256) for one in chat.examples(conversations[at : at + 256], rules)]
        seconds["ours"].append(time.perf_counter() - began)
        tokens = sum(len(ids_T) for rows in masked for ids_T, _ in rows.masked)
    rates = {name: round(tokens / statistics.median(found)) for name, found in seconds.items()}
    return {"conversations": COMPARED, "tokens_per_second": rates, "ratio": rates["ours"] / rates["datasets.map"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--conversations", type=int, default=200_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[len(os.sched_getaffinity(0))])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, options.conversations)
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.processor() or platform.machine()}",
            "one_process": against_datasets(rows, options.model_path),
            "command": [whole_command(rows, options.model_path, Path(folder) / f"out{n}", n) for n in options.workers],
        }
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
