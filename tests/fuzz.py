"""Damaged and hostile input by chance: what reads it either works, or raises an error that the user can mend, within
five seconds, and writes nothing outside of its output folder.

    python -m tests.fuzz --minutes 30 --output benchmarks/results/fuzz.json

A case follows from its kind and its seed alone, so that what is found once stays a test (tests/faults/test_fuzz.py).
"""

from __future__ import annotations

import argparse
import faulthandler
import gzip
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file

from specforge import config, endpoint, pipeline
from specforge.data import regenerate_server
from specforge.data.tokenize import ChatTokenizer
from specforge.draft import folder as draft_folder
from specforge.draft import inspection, layouts
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.errors import SpecforgeError
from specforge.features.index import committed_ids
from specforge.features.store import Store
from specforge.features.writer import StoreWriter
from specforge.files import seal, unseal
from specforge.target import weights
from specforge.train import checkpoint
from tests import stores, tiny

SECONDS = 5.0
EVIL: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 1 << 31, 1 << 63, 1 << 80, 10**9, 0.5, -0.0, float("inf"), float("nan"), "", "a",
    "../../outside", "/etc/hostname", "\x1b[2J\x1b]0;x\x07", "[red]x[/]", "\u202e", "x" * 5000, "true", [], [[]], [0],
    ["a", None], {}, {"a": 1}, {"": []}, [1, 2, 3], {"type": "text", "text": "a"}, [{"type": "text", "text": "a"}],
)  # fmt: skip
TEXTS = (
    b"[" * 3000,
    b"1e999",
    b"NaN",
    b"-9",
    b"99999999999999999999",
    b'"\\ud800"',
    b"\xff\xfe",
    b"\x00",
    b"{}",
    b"null",
)


class Source(random.Random):
    """What draws a case. Without changes it is the control: then nothing may be refused."""

    changes = True


# changes


def changed(source: Source, content: bytes) -> bytes:
    """The content with one to three faults; of JSON, of sealed JSON and of safetensors also such as keep its form."""
    for _ in range(source.choice((1, 1, 2, 3)) if source.changes else 0):
        kinds = [_bytes_changed]
        with suppress(ValueError, RecursionError):
            json.loads(content.removesuffix(b"\n"))
            kinds += [_json_changed] * 3
        if unseal(content.removesuffix(b"\n")) is not None:
            kinds += [_sealed_changed] * 6
        if _header_of(content) is not None:
            kinds += [_header_changed] * 3
        with suppress(RecursionError):
            content = source.choice(kinds)(source, content)
    return content


def _bytes_changed(source: Source, content: bytes) -> bytes:
    at = source.randrange(len(content) + 1)
    to = min(len(content), at + source.choice((1, 4, 30, 1000)))
    kind = source.randrange(6)
    if kind == 0 and at < len(content):
        return content[:at] + bytes([content[at] ^ (1 << source.randrange(8))]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + source.randbytes(source.choice((1, 8, 100))) + content[at:]
    if kind == 3:
        return content[:at] + content[to:]
    if kind == 4:
        return content[:to] + content[at:to] + content[to:]
    return content[:at] + source.choice(TEXTS) + content[at:]


def _json_changed(source: Source, content: bytes) -> bytes:
    value = _value_changed(source, json.loads(content.removesuffix(b"\n")))
    text = json.dumps(value, ensure_ascii=source.random() < 0.5).encode("utf-8", "surrogatepass")
    if source.random() < 0.05:
        text = text.replace(b"null", source.choice(TEXTS), 1)
    return text + b"\n" * content.endswith(b"\n")


def _sealed_changed(source: Source, content: bytes) -> bytes:
    value = _value_changed(source, unseal(content.removesuffix(b"\n")))
    return seal(value).encode("utf-8", "surrogatepass") + b"\n" if isinstance(value, dict) and value else content


def _header_of(content: bytes) -> tuple[Any, bytes] | None:
    length = int.from_bytes(content[:8], "little")
    try:
        return (json.loads(content[8 : 8 + length]), content[8 + length :]) if length < len(content) else None
    except (ValueError, RecursionError):
        return None


def _header_changed(source: Source, content: bytes) -> bytes:
    header, rest = _header_of(content) or ({}, b"")
    text = json.dumps(_value_changed(source, header)).encode("utf-8", "surrogatepass")
    return (len(text) + source.choice((0, 0, 0, 0, 1, -1))).to_bytes(8, "little") + text + rest


def _value_changed(source: Source, value: Any) -> Any:
    """One place of it, deep or not."""
    if isinstance(value, dict | list) and value and source.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, kind = source.choice(keys), source.random()
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        if kind < 0.1:
            del copy[key]
        elif kind < 0.15 and isinstance(copy, list):
            copy.append(copy[key])
        elif kind < 0.15:
            copy[str(source.choice(EVIL))] = copy[key]
        elif kind < 0.2 and len(keys) > 1:
            copy[key] = copy[source.choice(keys)]
        else:
            copy[key] = _value_changed(source, value[key])
        return copy
    if isinstance(value, int) and not isinstance(value, bool) and source.random() < 0.5:
        return value + source.choice((-1, 1, 8, -value, value, 1 << 33))
    if source.random() < 0.05:
        for _ in range(source.choice((50, 900))):
            value = [value] if source.random() < 0.5 else {"a": value}
        return value
    return source.choice(EVIL)


def file_changed(source: Source, path: Path) -> None:
    content = path.read_bytes() if path.exists() else b""
    if not content or not source.changes:
        return
    if source.random() < 0.05:
        path.unlink()
    elif path.suffix == ".jsonl" and source.random() < 0.8:
        lines = content.splitlines(keepends=True)
        at = source.randrange(len(lines))
        lines[at] = changed(source, lines[at])
        path.write_bytes(b"".join(lines))
    else:
        path.write_bytes(changed(source, content))


# what is watched

_written: list[str] | None = None
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NAMES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _written is None:
        return
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING and arguments[0] is not None:
        _written.append(os.fsdecode(arguments[0]) if not isinstance(arguments[0], int) else "")
    elif event in NAMES:
        path, folder = (1, -1) if event in ("os.rename", "os.link", "os.symlink") else (0, -1)
        if isinstance(arguments[path], str | bytes):
            at = arguments[folder] if isinstance(arguments[folder], int) else -1
            beside = os.readlink(f"/proc/self/fd/{at}") if at >= 0 else ""
            _written.append(os.path.join(beside, os.fsdecode(arguments[path])))


@contextmanager
def watched(case: Path) -> Iterator[list[str]]:
    """Gathers paths that are written outside of the folder `out` of the case, of the caches and of /dev."""
    global _written
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked.append(True)
    _written, outside = [], list[str]()
    try:
        yield outside
    finally:
        found, _written = _written, None
        free = [str(case / "out"), os.environ["XDG_CACHE_HOME"], "/dev/", "/proc/", tempfile.gettempdir() + "/pymp-"]
        absolute = (os.path.abspath(path) for path in found if path)
        outside.extend(
            sorted({one for one in absolute if not one.startswith(tuple(free)) and "__pycache__" not in one})
        )


_hooked: list[bool] = []


def tried(kind: str, seed: int, case: Path) -> str:
    """What is wrong with how this case ends; "" if nothing is. `case`: an empty folder. A seed below 0: the control."""
    source = Source(f"{kind} {seed}")
    source.changes = seed >= 0
    (case / "out").mkdir(parents=True)
    run = KINDS[kind](source, case)
    before = {
        path: path.read_bytes() for path in case.rglob("*") if path.is_file() and case / "out" not in path.parents
    }
    began, fault = time.monotonic(), ""
    faulthandler.dump_traceback_later(60, exit=True)
    with watched(case) as outside:
        for step in run:
            try:
                step()
            except (SpecforgeError, OSError) as error:
                fault = fault or ("" if source.changes else f"refused what is whole: {error}")
            except BaseException as error:  # a panic of a library in Rust is no Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                fault = traceback.format_exc()
                break
    faulthandler.cancel_dump_traceback_later()
    seconds = time.monotonic() - began
    after = {path: path.read_bytes() for path in case.rglob("*") if path.is_file() and case / "out" not in path.parents}
    if seconds > SECONDS:
        fault = fault or f"took {seconds:.1f} s"
    if outside or after != before:
        fault = fault or f"written outside of the output: {outside or 'an input'}"
    return fault


# the kinds

Steps = list[Callable[[], Any]]


def command(name: str, settings: type[config.Settings], **given: Any) -> Callable[[], Any]:
    return lambda: pipeline.run(name, config.load(settings, given, None))


@cache
def made(name: str) -> Path:
    """What the cases of a kind change, whole."""
    folder = Path(tempfile.mkdtemp(prefix="specforge-fuzz-")) / name
    if name == "store":
        for codec in ("bf16", "fp8", "bf16+zstd"):
            stores.filled(folder / codec, 12, codec, shard_bytes=9000)
    elif name == "target":
        tiny.make_target(folder)
    elif name == "draft":
        info = weights.describe(str(made("target")))
        kept_D = torch.arange(3, 103)
        draft = Eagle3Draft(DraftConfig.for_target(info, weights.default_aux_layers(info.num_layers), 100))
        draft_folder.save(folder / "sglang", draft, kept_D, draft.state_dict(), torch.float32)
        for layout in ("vllm", "safeailab"):
            with suppress(SpecforgeError):
                layouts.write(layouts.read(folder / "sglang"), layout, folder / layout, info, "target")
    return folder


def store(source: Source, case: Path) -> Steps:
    """Index and shards: read, verified, shown, merged, gone on with."""
    codec = source.choice(("bf16", "fp8", "bf16+zstd"))
    mine = case / ("out/store" if source.random() < 0.3 else "store")
    shutil.copytree(made("store") / codec, mine)
    other = case / "other"
    stores.filled(other, 3, codec, data_hash="d1")
    if source.random() < 0.2:
        (mine / "set-aside.jsonl").write_text('{"sample_id": 3, "reason": "too long"}\n')
    for _ in range(source.choice((1, 1, 2))):
        names = sorted(path.name for path in mine.iterdir() if path.is_file() and not path.name.startswith("."))
        file_changed(source, mine / source.choice([*names, "shards.jsonl", "shards.jsonl", "manifest.json"]))
    verify = source.choice(("always", "first", "never"))

    def read() -> None:
        found = Store(mine, verify, partial=source.random() < 0.5)
        for index in range(len(found)):
            found.record(index)
        list(found.tokens_and_masks())

    def go_on() -> None:
        with StoreWriter(mine, stores.manifest(12, codec), shard_bytes=9000) as writer:
            for sample_id in sorted(set(range(12)) - committed_ids(mine)):
                writer.add(stores.record(sample_id, codec=codec))

    steps: Steps = [
        read,
        command("store verify", config.StoreVerifySettings, folder=mine),
        command("store info", config.StoreInfoSettings, folder=mine),
        command("store merge", config.StoreMergeSettings, folders=(mine, other), output=case / "out" / "merged"),
    ]
    return [*steps, go_on, read] if case / "out" in mine.parents else steps


def draft(source: Source, case: Path) -> Steps:
    """A draft folder: loaded, inspected, put into other layouts."""
    layout = source.choice(sorted(path.name for path in made("draft").iterdir()))
    mine = case / "draft"
    shutil.copytree(made("draft") / layout, mine)
    file_changed(source, mine / source.choice(("config.json", "config.json", "model.safetensors")))
    info = weights.describe(str(made("target")))

    def inspected() -> None:
        found = layouts.read(mine)
        str(inspection.inspect(inspection.Subject(found=found, target=info, highest_token=399, special_ids=[0, 1])))
        str(inspection.beyond(found))

    export = [
        command("export", config.ExportSettings, folder=mine, to=to, output=case / "out" / to, model_path=info.path)
        for to in ("sglang", "vllm", "safeailab")
    ]
    return [lambda: draft_folder.load(mine, torch.float32), inspected, *export]


def rows(source: Source, case: Path) -> Steps:
    """Rows of all formats to prepared data, and prepared data to examples."""
    target, whole = str(made("target")), tiny.conversations(8, seed=source.randrange(99))
    if source.random() < 0.5:
        for row in whole[:4]:
            turns: Any = row["conversations"]
            turns[1]["reasoning_content"] = "hm"
            turns[3] |= {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}
            row["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}]
    if source.random() < 0.5:  # what else a row may hold
        exact = [{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}]
        whole[4] |= {"rows": exact, "tokenizer_hash": ChatTokenizer(target).fingerprint}
        whole[5] |= {"chat_template_kwargs": {"enable_thinking": False}, "loss_mask": [0, 0, 0, 1]}
        turns = whole[6]["conversations"]
        turns[1] |= {"content": "", "function_call": {"name": "f", "arguments": '{"a": 1e3}'}, "weight": 0}
        turns[3]["content"] = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "</think>yes"}]
        whole.append({"instruction": "a", "output": "b", "history": [["c", "d"]], "reasoning": "e"})
    if source.random() < 0.2:
        whole = [{"prompt": "a", "response": "b"}, *whole]
    tokens = [{"id": str(n), "input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]} for n in range(4)]
    lines = [json.dumps(row).encode() + b"\n" for row in [*whole, *tokens]]
    for _ in range(source.choice((1, 2, 4))):
        at = source.randrange(len(lines))
        lines[at] = changed(source, lines[at])
    name, content = "rows.jsonl", b"".join(lines)
    kind = source.random()
    if kind < 0.1:
        name, content = "rows.json", b"[" + b",".join(line.strip() for line in lines) + b"]"
    elif kind < 0.2:
        name, content = "rows.jsonl.gz", gzip.compress(content)
        content = changed(source, content) if source.random() < 0.5 else content
    elif kind < 0.3:
        name = "rows.parquet"
        plain = [row for row in whole if all(isinstance(turn["content"], str) for turn in row.get("conversations", []))]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), case / name)
        content = changed(source, (case / name).read_bytes())
    (case / name).write_bytes(content)
    templates = (None, None, "qwen3", "mistral", "deepseek", "gpt-oss", "gemma")
    template = source.choice(templates) if source.changes else None
    given = {
        "dataset": (str(case / name),), "model_path": target, "output": case / "out" / "data", "workers": 1,
        "max_bad_rows": 1.0, "chat_template": template, "overlong": source.choice(("drop", "truncate-turn")),
    }  # fmt: skip
    prepare = command("prepare-data", config.PrepareDataSettings, **given)

    def prepared_changed() -> None:
        for path in (case / "out" / "data").glob("*.json*"):
            if source.random() < 0.5:
                file_changed(source, path)

    show = command("prepare-data", config.PrepareDataSettings, **given, show_mask=3)
    plan = command("plan", config.PlanSettings, model_path=target, data=case / "out" / "data")
    return [show, prepare, prepared_changed, plan, prepare]


def stream(source: Source, case: Path) -> Steps:
    """A server's answers, whole and as streams: regenerate and benchmark."""
    said = [
        {"choices": [{"delta": {"content": "a "}, "finish_reason": None}], "usage": None},
        {"choices": [{"delta": {"content": "b", "reasoning_content": "c"}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"completion_tokens": 2, "spec_verify_ct": 1, "completion_tokens_details": None}},
    ]
    parts = [b"data: " + json.dumps(part).encode() + b"\n\n" for part in said] + [b"data: [DONE]\n\n"]
    for _ in range(source.choice((1, 2))):
        at = source.randrange(len(parts))
        body = parts[at].removeprefix(b"data: ").removesuffix(b"\n\n")
        parts[at] = changed(source, body) if source.random() < 0.2 else b"data: " + changed(source, body) + b"\n\n"
    answer = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 2}}
    info = {"internal_states": [{"avg_spec_accept_length": 2.0}], "speculative_algorithm": "EAGLE3", "version": "1"}
    metrics = (
        b'# HELP x\nvllm:spec_decode_num_accepted_tokens_total{a="b"} 4.0\nvllm:spec_decode_num_drafts_total 2.0\n'
    )
    bodies = {
        "/v1/models": json.dumps({"data": [{"id": "m"}]}).encode(),
        "/get_server_info": json.dumps(info).encode() if source.random() < 0.5 else b"",
        "/server_info": b"",
        "/metrics": metrics if source.random() < 0.5 else b"",
        "/v1/chat/completions": json.dumps(answer).encode(),
        "stream": b"".join(parts),
    }
    broken = source.choice(
        ("/v1/models", "/get_server_info", "/metrics", "/v1/chat/completions", "/v1/chat/completions")
    )
    bodies[broken] = changed(source, bodies[broken] or b"{}")
    headers = {}
    if source.changes and source.random() < 0.15:
        headers["Content-Encoding"] = source.choice(("gzip", "deflate", "br", "zstd", "x"))
    status = source.choice((200, 200, 200, 200, 400, 500, 204, 301, 999)) if source.changes else 200
    tiny.write_jsonl(case / "prompts.jsonl", tiny.conversations(3, turns=1))
    url, stop = serving(bodies, headers, status)
    regenerate = command(
        "regenerate", config.RegenerateSettings, server=url, prompts=case / "prompts.jsonl",
        output=case / "out" / "answers.jsonl",
    )  # fmt: skip
    benchmark = command(
        "benchmark", config.BenchmarkSettings, server=url, questions=str(case / "prompts.jsonl"), num_prompts=3,
        concurrency=(2,), output=case / "out" / "result.json",
    )  # fmt: skip
    return [regenerate, benchmark, stop]


def serving(bodies: dict[str, bytes], headers: dict[str, str], status: int) -> tuple[str, Callable[[], None]]:
    """(URL, what ends it) of a server of such answers; the status is that of answers to questions."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = bodies.get(self.path)
            self.answer(body or b"", 200 if body else 404, {})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(bodies["stream" if asked.get("stream") else self.path], status, headers)

        def answer(self, body: bytes, status: int, more: dict[str, str]) -> None:
            with suppress(OSError):
                self.send_response(status)
                for name, value in more.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return f"http://127.0.0.1:{server.server_port}", stop


def target(source: Source, case: Path) -> Steps:
    """The target's folder: described, its tokenizer loaded and used, its head read."""
    mine = case / "target"
    shutil.copytree(made("target"), mine)
    names = ("config.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    file_changed(source, mine / source.choice([name for name in names if (mine / name).exists()]))
    conversation = tiny.conversations(1)[0]["conversations"]

    def described() -> None:
        info = weights.describe(str(mine))
        weights.default_aux_layers(info.num_layers)
        weights.loaded_bytes(info, torch.float32)
        weights.load_head(info, torch.float32)

    def used() -> None:
        tokenizer = ChatTokenizer(str(mine))
        tokenizer.render(conversation)  # type: ignore[arg-type]
        tokenizer.stop_ids()
        tokenizer.special_ids()

    return [described, used]


def run_folder(source: Source, case: Path) -> Steps:
    """What a training leaves: its report, and its checkpoint."""
    from tests.unit import test_report

    mine = case / "out" / "run"
    test_report.training(mine)
    test_report.benchmark(mine / "benchmark.json", draft=str(mine / "best"))
    saved = mine / "checkpoints" / "step-00000001"
    saved.mkdir(parents=True)
    save_file({"a": torch.ones(3)}, saved / "optimizer.safetensors")
    files = {"optimizer.safetensors": checkpoint.digest(saved / "optimizer.safetensors")}
    (saved / checkpoint.STATE).write_text(seal({"state": {"epoch": 1}, "identity": {"a": 1}, "files": files}) + "\n")
    names = (
        "run.json",
        "metrics.jsonl",
        "metrics.jsonl",
        "benchmark.json",
        f"checkpoints/{saved.name}/{checkpoint.STATE}",
    )
    file_changed(source, mine / source.choice(names))
    report = command("report", config.ReportSettings, runs=(mine,), output=case / "out" / "report.html")
    return [report, lambda: checkpoint.load_newest(mine / "checkpoints", {"a": 1})]


def settings_file(source: Source, case: Path) -> Steps:
    """--config, and DeepSpeed's settings."""
    given = {"model_path": "target", "data": "data", "features": "feat", "output": "out", "epochs": 3, "lr": "auto"}
    text = (
        json.dumps(given).encode()
        if source.random() < 0.5
        else "".join(f"{k}: {v}\n" for k, v in given.items()).encode()
    )
    (case / "settings.yaml").write_bytes(changed(source, text))
    (case / "ds.json").write_bytes(changed(source, Path("ds_config.json").read_bytes()))

    def deepspeed() -> None:
        from specforge.records import Ranks
        from specforge.train.optimizer import deepspeed_config
        from specforge.train.recipe import choose

        chosen = config.load(config.TrainSettings, {"features": "x", "deepspeed_config": case / "ds.json"}, None)
        deepspeed_config(chosen, choose(chosen, 1000, 64, 1)[0], Ranks(), torch.bfloat16)

    return [lambda: config.load(config.TrainSettings, {}, case / "settings.yaml"), deepspeed]


KINDS: dict[str, Callable[[Source, Path], Steps]] = {
    "store": store, "draft": draft, "rows": rows, "stream": stream, "target": target, "run": run_folder,
    "settings": settings_file,
}  # fmt: skip


def quick() -> None:
    """Waits of the clients as short as the tests need them."""
    regenerate_server.FIRST_WAIT = 0.001
    endpoint.MOST_BODY = 1 << 20


@dataclass
class Found:
    cases: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    faults: dict[int, str] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each kind")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    os.environ.setdefault("XDG_CACHE_HOME", tempfile.mkdtemp(prefix="specforge-fuzz-cache-"))
    quick()
    found = {kind: Found() for kind in chosen.kinds}
    until = time.monotonic() + 60 * chosen.minutes
    for kind, one in found.items():
        with tempfile.TemporaryDirectory() as case:
            one.faults |= {-1: fault} if (fault := tried(kind, -1, Path(case))) else {}
            print(*one.faults.values(), sep="\n")
    while time.monotonic() < until:
        for kind, one in found.items():
            if one.seconds > min(other.seconds for other in found.values()) + 5:
                continue  # each kind has the same time
            case, began = Path(tempfile.mkdtemp(prefix="specforge-fuzz-case-")), time.monotonic()
            seed = chosen.seed + one.cases
            fault = tried(kind, seed, case)
            took = time.monotonic() - began
            one.cases, one.seconds, one.slowest = one.cases + 1, one.seconds + took, max(one.slowest, took)
            if fault:
                one.faults[seed] = fault
                print(f"--- {kind} {seed}\n{fault}", flush=True)
            shutil.rmtree(case)
    summary = {
        kind: {
            "cases": one.cases, "first_seed": chosen.seed, "seconds": round(one.seconds),
            "slowest_seconds": round(one.slowest, 2), "faults": sorted(one.faults),
        }
        for kind, one in found.items()
    }  # fmt: skip
    print(json.dumps(summary, indent=2))
    if chosen.output:
        chosen.output.write_text(json.dumps(summary, indent=2) + "\n")
    sys.exit(any(one.faults for one in found.values()))


if __name__ == "__main__":
    main()
