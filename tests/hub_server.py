"""A hub on the loopback interface: the part of its protocol that huggingface_hub uses for data sets, and its faults.

Listing (`/api/datasets/...`), tree, and `resolve` with HEAD, GET and ranges. Large formats are answered as the real hub
answers for LFS files: a redirect with the size and SHA-256 in headers, to an address on another host name.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

ULTRACHAT = "HuggingFaceH4/ultrachat_200k"
SHAREGPT = "anon8231489123/ShareGPT_Vicuna_unfiltered"
SHAREGPT_52K = "RyokoAI/ShareGPT52K"
LFS_SUFFIXES = (".parquet", ".json", ".jsonl", ".zst")


# Rows in the schema of the real data sets


def ultrachat_row(number: int) -> dict[str, object]:
    prompt = f"How do I cook dish {number}? Answer in ä few words."
    messages = [{"content": prompt, "role": "user"}, {"content": f"Boil it {number} times.\n", "role": "assistant"}]
    return {"prompt": prompt, "prompt_id": hashlib.sha256(prompt.encode()).hexdigest(), "messages": messages}


def ultrachat_parquet(rows: list[dict[str, object]], row_group_size: int = 4) -> bytes:
    message = pa.struct([("content", pa.string()), ("role", pa.string())])
    schema = pa.schema([("prompt", pa.string()), ("prompt_id", pa.string()), ("messages", pa.list_(message))])
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, row_group_size=row_group_size)
    return file.getvalue()


def sharegpt_row(number: int) -> dict[str, object]:
    turns = [
        {"from": "human", "value": f"Tell me “{number}” facts"},
        {"from": "gpt", "value": "Fact one.\n\nFact two."},
    ]
    return {"id": f"QWJhYvA_{number}", "conversations": turns}


def sharegpt_52k_row(number: int) -> dict[str, object]:
    answer = '<div class="markdown prose w-full break-words dark:prose-invert light"><p>It is &lt;b&gt;.</p></div>'
    turns = [{"from": "human", "value": f"What is tag {number}?"}, {"from": "gpt", "value": answer}]
    return {"id": f"kGHTqmA_{number}", "conversations": turns}


def json_array(rows: list[dict[str, object]]) -> bytes:
    return json.dumps(rows, indent=2).encode()


def repositories() -> dict[str, dict[str, bytes]]:
    """The three data sets in small, with the names that their files have."""
    shards = [ultrachat_parquet([ultrachat_row(10 * shard + n) for n in range(10)]) for shard in range(3)]
    sft = {f"data/train_sft-{n:05}-of-00003-a3ecf92756993583.parquet": shard for n, shard in enumerate(shards)}
    other = {
        f"data/{split}-00000-of-00001-{split}.parquet": ultrachat_parquet([ultrachat_row(900)])
        for split in ("train_gen", "test_sft", "test_gen")
    }
    return {
        ULTRACHAT: {".gitattributes": b"*.parquet filter=lfs\n", "README.md": b"# UltraChat\n"} | other | sft,
        SHAREGPT: {
            "README.md": b"---\nlicense: apache-2.0\n---\n",
            "ShareGPT_V3_unfiltered_cleaned_split.json": json_array([sharegpt_row(n) for n in range(40)]),
            "ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json": json_array([sharegpt_row(0)]),
        },
        SHAREGPT_52K: {
            "sg_90k_part1.json": json_array([sharegpt_52k_row(n) for n in range(7)]),
            "sg_90k_part2.json": json_array([sharegpt_52k_row(n) for n in range(7, 12)]),
        },
    }


@dataclass
class Hub:
    """What the server holds, does wrong, and was asked for. A fault with a number happens so many times."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=repositories)
    gone: set[str] = field(default_factory=set)  # 404
    gated: set[str] = field(default_factory=set)  # listed, but 401 for the files
    busy: int = 0  # 503
    busy_storage: int = 0  # 503 for the content of a file, when its listing and HEAD were well
    cut_after: int | None = None  # bytes of a file after which the connection is closed
    cuts: int = 10**9
    announced_too_much: int = 0  # bytes more in the sizes that HEAD announces
    etag: str | None = None  # of every file
    altered: int = 0  # files delivered with one byte changed
    asked: list[tuple[str, str]] = field(default_factory=list)  # (method, path)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()

    def takes(self, fault: str) -> bool:
        """Whether the fault happens now; counts it."""
        with self.lock:
            left = getattr(self, fault)
            setattr(self, fault, max(0, left - 1))
            return left > 0

    def downloads(self) -> list[str]:
        """Names of the files that were asked for with GET."""
        return [path.rsplit("/", 1)[-1] for method, path in self.asked if method == "GET" and "/api/" not in path]


def hashes(content: bytes) -> tuple[str, str]:
    """(SHA-256, git's hash) of a file."""
    return hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(name: str, content: bytes) -> dict[str, object]:
    """A file as the tree listing shows it."""
    sha256, git = hashes(content)
    found: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": git}
    if name.endswith(LFS_SUFFIXES):
        found |= {"lfs": {"oid": sha256, "size": len(content), "pointerSize": 134}, "oid": "0" * 40}
    return found


def sibling(name: str, content: bytes) -> dict[str, object]:
    """The same file as the repository's page shows it."""
    found = entry(name, content)
    shown = {"rfilename": name, "size": found["size"], "blobId": found["oid"]}
    if "lfs" in found:
        shown["lfs"] = {"sha256": hashes(content)[0], "size": len(content), "pointerSize": 134}
    return shown


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *values: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/agent-harnesses":  # not about data: huggingface_hub asks for names to put into its User-Agent
            return self.reply(404, b"")
        self.hub.asked.append((self.command, path))
        if self.hub.takes("busy") or (path.startswith("/storage/") and self.hub.takes("busy_storage")):
            return self.reply(503, b"busy")
        listing = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(/revision/[^/]+)?", path)
        tree = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+", path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        stored = re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path)
        found = listing or tree or file or stored
        if not found or found[1] not in self.hub.repos or found[1] in self.hub.gone:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        repo, files = found[1], self.hub.repos[found[1]]
        if listing:
            blobs = "blobs" in parse_qs(urlsplit(self.path).query)
            siblings = [sibling(*item) if blobs else {"rfilename": item[0]} for item in files.items()]
            shown = {"id": repo, "sha": self.hub.commit(repo), "private": False, "siblings": siblings}
            return self.reply(200, json.dumps(shown).encode())
        if tree:
            return self.reply(200, json.dumps([entry(*item) for item in files.items()]).encode())
        if found[2] not in files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        if repo in self.hub.gated:
            return self.reply(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        return self.content(files[found[2]]) if stored else self.resolve(repo, found[2], files[found[2]])

    def resolve(self, repo: str, name: str, content: bytes) -> None:
        sha256, git = hashes(content)
        headers = {"X-Repo-Commit": self.hub.commit(repo), "Accept-Ranges": "bytes"}
        if not name.endswith(LFS_SUFFIXES):
            headers["ETag"] = f'"{self.hub.etag or git}"'
            return self.content(content, headers)
        headers["X-Linked-Etag"] = f'"{self.hub.etag or sha256}"'
        headers["X-Linked-Size"] = str(len(content) + self.hub.announced_too_much)
        headers["Location"] = f"http://localhost:{self.server.server_address[1]}/storage/{repo}/{name}"
        return self.reply(302, b"", headers)

    def content(self, content: bytes, headers: dict[str, str] | None = None) -> None:
        if self.command == "GET" and self.hub.takes("altered"):
            content = bytes([content[0] ^ 1]) + content[1:]
        first, headers = 0, dict(headers or {})
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked:
            first = int(asked[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        cut = None
        if self.command == "GET" and self.hub.cut_after is not None and self.hub.takes("cuts"):
            cut = max(0, self.hub.cut_after - first)
        self.reply(206 if asked else 200, content[first:], headers, cut)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """`hub` on a free port; `hub.url` is what HF_ENDPOINT must be."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
