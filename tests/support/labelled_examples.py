"""Small examples with labels, for trainers that are not fastft's."""

from __future__ import annotations

import torch

Feature = dict[str, list[int]]


def labelled(n: int = 48, vocab: int = 97) -> list[Feature]:
    """Prompts that begin alike, and answers of very different lengths, which alone have labels."""
    generator = torch.Generator().manual_seed(2)
    beginnings = [torch.randint(3, vocab, (12,), generator=generator).tolist() for _ in range(3)]
    made = []
    for index in range(n):
        own = torch.randint(3, vocab, (2 + index * 7 % 13,), generator=generator).tolist()
        prompt, answer = beginnings[index % 3] + own[:1], own[1:]
        made.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return made


def padded(features: list[Feature]) -> dict[str, torch.Tensor]:
    """An ordinary collator: rows padded at their end."""
    width = max(len(feature["input_ids"]) for feature in features)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for feature in features:
        more = width - len(feature["input_ids"])
        rows["input_ids"].append(feature["input_ids"] + [0] * more)
        rows["labels"].append(feature["labels"] + [-100] * more)
        rows["attention_mask"].append([1] * (width - more) + [0] * more)
    return {name: torch.tensor(value) for name, value in rows.items()}
