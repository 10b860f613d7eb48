"""SGLang's own HTTP server on this machine, without a GPU too: python sglang_server.py, with its flags.

Its processes are spawned anew and import this file: specforge, imported first, lets torchvision be imported there."""

import sys

import specforge  # noqa: F401

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(sys.argv[1:]))
