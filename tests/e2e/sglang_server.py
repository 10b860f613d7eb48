"""SGLang's own HTTP server on this machine, without a GPU too: python sglang_server.py, with its flags.

Its processes are spawned anew and import this file: specforge, imported first, lets torchvision be imported there.

With TRITON_INTERPRET=1 EAGLE-3 runs without a GPU, too: `--attention-backend triton --dtype float32`, SGLang's own
Triton kernels in Triton's interpreter. Where SGLang builds and verifies the tree of drafts it has CUDA kernels, and
Triton ones for Intel's GPUs; the two flags choose the latter. (Not in bfloat16: the texts come out wrong.)"""

import os
import sys

import specforge  # noqa: F401

if os.environ.get("TRITON_INTERPRET") == "1":
    from sglang.kernels.ops.speculative import cache_locs
    from sglang.srt.speculative import eagle_utils

    eagle_utils._is_xpu = cache_locs._is_xpu = True

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(sys.argv[1:]))
