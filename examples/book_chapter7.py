"""Chapter 7 of "Build a Large Language Model (From Scratch)" over fastft: the book's script with one import changed.

`python examples/book_chapter7.py [instruction-data.json]` tunes a small model with random weights on a CPU, in seconds;
give the book's file, and `BASE_CONFIG` one of its sizes with `load_weights_into_gpt`, for the real thing.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from fastft.data.tokenizer import gpt2_tokenizer

# In the book: from previous_chapters import ..., and the rest of its script.
from fastft.integrations.book import (
    GPTModel,
    InstructionDataset,
    calc_loss_loader,
    custom_collate_fn,
    format_input,
    generate,
    text_to_token_ids,
    token_ids_to_text,
    train_model_simple,
)

BASE_CONFIG = {
    "vocab_size": 50257,
    "context_length": 256,
    "drop_rate": 0.0,
    "qkv_bias": True,
    "emb_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
}


def sample_data() -> list[dict[str, str]]:
    """Entries in the form of the book's, for where its file is not there."""
    numbers = range(10, 40)
    return [
        {"instruction": "Add one to the number.", "input": f"{n}", "output": f"The sum is {n + 1}."} for n in numbers
    ]


def main(file_path: str | None = None, *, num_epochs: int = 2, folder: Path = Path()) -> dict[str, Any]:
    """The chapter: data, losses, training, responses, the model's file."""
    data = json.loads(Path(file_path).read_text(encoding="utf-8")) if file_path else sample_data()
    train_portion, test_portion = int(len(data) * 0.85), int(len(data) * 0.1)
    train_data = data[:train_portion]
    test_data = data[train_portion : train_portion + test_portion]
    val_data = data[train_portion + test_portion :]

    tokenizer = gpt2_tokenizer().encoding  # tiktoken.get_encoding("gpt2"), also without a network
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    collate_fn = partial(custom_collate_fn, device=device, allowed_max_length=256)
    torch.manual_seed(123)
    train_loader = DataLoader(
        InstructionDataset(train_data, tokenizer), batch_size=8, collate_fn=collate_fn, shuffle=True, drop_last=True
    )
    val_loader = DataLoader(InstructionDataset(val_data, tokenizer), batch_size=8, collate_fn=collate_fn)

    model = GPTModel(BASE_CONFIG).to(device)
    with torch.no_grad():
        initial = calc_loss_loader(train_loader, model, device, num_batches=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    torch.manual_seed(123)
    train_losses, val_losses, tokens_seen = train_model_simple(
        model, train_loader, val_loader, optimizer, device,
        num_epochs=num_epochs, eval_freq=5, eval_iter=5,
        start_context=format_input(val_data[0]), tokenizer=tokenizer,
    )  # fmt: skip

    for entry in test_data:
        input_text = format_input(entry)
        token_ids = generate(
            model=model, idx=text_to_token_ids(input_text, tokenizer).to(device),
            max_new_tokens=20, context_size=BASE_CONFIG["context_length"], eos_id=50256,
        )  # fmt: skip
        generated_text = token_ids_to_text(token_ids, tokenizer)
        entry["model_response"] = generated_text[len(input_text) :].replace("### Response:", "").strip()

    (folder / "instruction-data-with-response.json").write_text(json.dumps(test_data, indent=4), encoding="utf-8")
    torch.save(model.state_dict(), folder / "gpt2-sft.pth")  # the book's GPTModel and `fastft.load` read it
    return {"initial": initial, "train": train_losses, "val": val_losses, "tokens": tokens_seen, "test": test_data}


if __name__ == "__main__":
    main(*sys.argv[1:])
