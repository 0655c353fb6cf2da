"""llama.cpp's own server with one model, on the loopback, until standard input ends.

llama_server.py MODEL PORT           a judge, as people run it
llama_server.py MODEL PORT N_CTX     one that is held against float32: keys and values are kept in it
llama_server.py MODEL PORT N_CTX ADAPTER    the same with an adapter
"""

from __future__ import annotations

import sys

import xllamacpp


def serve(model: str, port: int, n_ctx: int | None, adapter: str | None) -> None:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = port
    parameters.n_ctx = n_ctx or 2048
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    # A prompt cache would make a reply depend on the questions before it.
    parameters.cache_prompt = False
    parameters.cache_ram_mib = 0
    if adapter:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    if n_ctx:
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # With it keys and values would be rounded to halves on the way.
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    sys.stdin.read()
    del server


if __name__ == "__main__":
    n_ctx, adapter = ([*sys.argv[3:], None, None])[:2]
    serve(sys.argv[1], int(sys.argv[2]), int(n_ctx) if n_ctx else None, adapter)
