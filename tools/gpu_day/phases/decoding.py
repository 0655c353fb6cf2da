"""Answering 64 of the book's prompts with 32 tokens each: by fastft, and by transformers' batched `generate`.

On a pretended GPU there are no logits: what is answered there, if anything, is no answer, and transformers' loop, which
ends by what has been computed, does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.peers import hf
from fastft.decoding.decode import NO_STOP, decode
from fastft.decoding.inference import prepared
from fastft.doctor.child_tasks import Found
from tools.gpu_day import models

_PROMPTS, _NEW = (4, 2) if models.PRETENDED else (64, 32)


def tasks() -> list[str]:
    """Ours, and the peer's."""
    return ["fastft"] if models.PRETENDED else ["fastft", "transformers"]


def do(task: str) -> Found:
    """Does one."""
    return _timed({"fastft": _fastft, "transformers": _transformers}[task]())


def _prompts() -> list[list[int]]:
    encoded = models.examples()
    return [encoded[i].tolist()[: int(encoded.first_target[i])] for i in range(_PROMPTS)]


def _timed(answer: Callable[[], object]) -> Found:
    """The second time: the first one compiles."""
    for _ in range(2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        answer()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return {"ms_per_token": 1e3 * seconds / _NEW, "tokens_per_s": _PROMPTS * _NEW / seconds}


def _fastft() -> Callable[[], object]:
    model = prepared(models.gpt2(), torch.bfloat16, rows=_PROMPTS).eval()
    return lambda: list(decode(model, _prompts(), max_new_tokens=_NEW, stop=NO_STOP, batch_size=_PROMPTS))


def _transformers() -> Callable[[], object]:
    from transformers import GPT2LMHeadModel

    with torch.device("cuda"):
        model = GPT2LMHeadModel._from_config(hf.hf_config(models.config()), attn_implementation="sdpa")
    model = model.to(torch.bfloat16).eval()
    prompts = _prompts()
    width = max(map(len, prompts))
    ids = torch.tensor([[hf.PAD] * (width - len(prompt)) + prompt for prompt in prompts], device="cuda")
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device="cuda")

    @torch.no_grad()
    def answer() -> object:
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False,
            pad_token_id=hf.PAD, eos_token_id=None,
        )  # fmt: skip

    return answer
