"""A server on loopback that streams answers and tells its accepted length exactly as SGLang 0.5.21 or vLLM does, by
their sources: SGLang's entrypoints/openai/serving_chat.py (`sglext` chunk, only where it was asked for), protocol.py
(SpecTokensDetails) and scheduler.py (`internal_states`); vLLM's v1/spec_decode/metrics.py (Prometheus counters). And
its faults."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Chat:
    """What the server is, does wrong, and was asked. Every answer has `tokens` tokens: one with the prompt, then
    one of each of `passes` passes and the `drafts` drafts that they accepted."""

    kind: str = "other"  # sglang, old-sglang (tells only its average), vllm, other
    speculative: bool = True
    drafts: int = 9
    passes: int = 6
    tokens: int = 16
    pause: float = 0.0  # seconds before each chunk
    dies_after: int | None = None  # answers, after which every connection is cut in the middle
    status: int = 200  # of every answer
    counts_tokens: bool = True  # whether it honours stream_options.include_usage
    chunks: list[dict] | None = None  # of every answer, instead of its own
    dies_at_flush: int | None = None  # the n-th /flush_cache, whose connection is cut
    flush_status: int = 200
    flushed: int = 0
    requests: list[dict] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""
    answered: int = 0
    running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def info(self) -> dict:
        """SGLang's /server_info, as far as it is read."""
        algorithm = "EAGLE3" if self.speculative else None
        average = 1 + self.drafts / self.passes
        told = self.speculative and self.answered > 0
        return {
            "version": "0.5.21",
            "speculative_algorithm": algorithm,
            "speculative_num_steps": 3 if self.speculative else None,
            "speculative_eagle_topk": 1 if self.speculative else None,
            "speculative_num_draft_tokens": 4 if self.speculative else None,
            "internal_states": [{"load": 0} | ({"avg_spec_accept_length": average} if told else {})],
        }

    def metrics(self) -> str:
        """vLLM's /metrics; two engines. Each answer adds to one of them."""
        lines = ["# TYPE vllm:num_requests_running gauge", 'vllm:num_requests_running{engine="0"} 0.0']
        if self.speculative:
            for engine, answers in (("0", 1000 + self.answered), ("1", 500)):
                labels = f'{{engine="{engine}",model_name="m"}}'
                lines += [
                    f"vllm:spec_decode_num_drafts_total{labels} {float(answers * self.passes)}",
                    f"vllm:spec_decode_num_drafts_created{labels} 1.7e+09",
                    f"vllm:spec_decode_num_accepted_tokens_total{labels} {float(answers * self.drafts):e}",
                    f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="{engine}",position="0"}} 7.0',
                ]
        return "\n".join(lines) + "\n"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    chat: Chat

    def log_message(self, format: str, *values: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            return self.reply(200, "")
        if self.path == "/v1/models":
            return self.reply(200, {"data": [{"id": "m"}]})
        if self.path in ("/server_info", "/get_server_info") and self.chat.kind.endswith("sglang"):
            return self.reply(200, self.chat.info())
        if self.path == "/metrics" and self.chat.kind == "vllm":
            return self.reply(200, self.chat.metrics())
        return self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.partition("?")[0] == "/flush_cache":
            self.chat.flushed += 1
            if self.chat.flushed == self.chat.dies_at_flush:
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            return self.reply(self.chat.flush_status, "Cache flushed." if self.chat.flush_status == 200 else "busy")
        request, chat = json.loads(content), self.chat
        with chat.lock:
            chat.requests.append(request)
            chat.running += 1
            chat.most_at_once = max(chat.most_at_once, chat.running)
            cut = chat.dies_after is not None and len(chat.requests) > chat.dies_after
        try:
            if chat.status != 200:
                return self.reply(chat.status, {"error": {"message": "it is too warm", "code": chat.status}})
            self.stream(request, cut)
        finally:
            with chat.lock:
                chat.running -= 1
                chat.answered += not cut

    def stream(self, request: dict, cut: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        chat = self.chat
        if chat.chunks is not None:
            for chunk in chat.chunks:
                time.sleep(chat.pause)
                self.chunk(chunk)
            self.write(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
            return
        self.chunk({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        for at in range(4):
            time.sleep(chat.pause)
            self.chunk({"choices": [{"index": 0, "delta": {"content": f"word{at} "}, "finish_reason": None}]})
            if cut:
                return self.connection.shutdown(socket.SHUT_RDWR)
        self.chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        if chat.kind == "sglang" and chat.speculative and request.get("return_spec_tokens_details"):
            details = {
                "spec_accept_rate": chat.drafts / chat.passes / 3,
                "spec_accept_length": chat.tokens / chat.passes,
                "spec_num_correct_drafts": chat.drafts,
                "spec_num_proposed_drafts": 3 * chat.passes,
                "spec_verify_ct": chat.passes,
            }
            self.chunk({"choices": [], "sglext": {"spec_tokens_details": details}})
        if chat.counts_tokens and (request.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 5, "completion_tokens": chat.tokens, "total_tokens": 5 + chat.tokens}
            self.chunk({"choices": [], "usage": usage})
        self.write(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def chunk(self, content: dict) -> None:
        head = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "usage": None}
        self.write(b"data: " + json.dumps(head | content).encode() + b"\n\n")

    def write(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def reply(self, status: int, content: object) -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def chatting(chat: Chat) -> Iterator[Chat]:
    """`chat` on a free port, at `chat.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"chat": chat}))
    server.daemon_threads = True
    chat.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield chat
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
