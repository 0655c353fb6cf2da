"""An adapter as a GGUF file by itself, which llama.cpp puts into a GGUF of its base (`--lora`).

llama.cpp counts a product `alpha / r`, takes A as `[r, in]` and B as `[out, r]`, as PEFT does, and knows nothing of
lengths (DoRA), nor of rows for new tokens (src/llama-adapter.cpp). Its own converter transposes GPT-2's once more.
"""

from __future__ import annotations

from pathlib import Path

from fastft.common import files
from fastft.common.errors import UserError
from fastft.common.optional import need
from fastft.export.gguf_file import name_in_gguf
from fastft.model.peft_reading import Adapter

_INSTEAD = "`--to gguf` writes the merged model, which has all of it"


def check_adapter(adapter: Adapter) -> None:
    """Refuses an adapter that llama.cpp cannot compute.

    Raises:
        UserError: it is one; the reason is given.
    """
    if adapter.config.uses_dora:
        raise UserError(
            f"got --to gguf-adapter and {adapter.folder}, which is DoRA; llama.cpp has no word for the lengths that it "
            f"learns beside the directions: {_INSTEAD}"
        )
    if adapter.rows:
        n = max(len(rows) for rows, _ in adapter.rows.values())
        raise UserError(
            f"got --to gguf-adapter and {adapter.folder}, which has {n} rows for tokens of a template; "
            f"the base's GGUF has not, and llama.cpp's adapters cannot add them: {_INSTEAD}"
        )
    if adapter.weights or any(one.bias is not None for one in adapter.matrices.values()):
        raise UserError(f"got --to gguf-adapter and {adapter.folder}, which changes more than matrices: {_INSTEAD}")


def write_gguf_adapter(adapter: Adapter, path: Path, *, name: str) -> None:
    """Writes an adapter in float32.

    Args:
        adapter: that `check_adapter` lets pass.
        path: of the file.
        name: of the adapter.

    Raises:
        UserError: the package gguf is not installed, or the file cannot be written.
    """
    gguf = need("gguf", extra="gguf")
    # One alpha stands for all; where scales differ, B is made larger or smaller by the rest.
    alpha = max(one.scaling * len(one.A) for one in adapter.matrices.values())
    with files.replacing(path) as file:
        writer = gguf.GGUFWriter(file.name, "gpt2")
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for matrix, one in sorted(adapter.matrices.items()):
            of, rest = name_in_gguf(f"{matrix}.weight"), one.scaling * len(one.A) / alpha
            writer.add_tensor(f"{of}.lora_a", one.A.float().contiguous().numpy())
            writer.add_tensor(f"{of}.lora_b", (one.B.double() * rest).float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
