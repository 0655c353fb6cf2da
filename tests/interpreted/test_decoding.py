"""Decoding in a fixed number of rows through the Triton kernels."""

from __future__ import annotations

from talkers import SHAPES, in_order, model, with_beginning

from fastft.decoding.decode import NO_STOP, Decoder, decode
from fastft.model.gpt2 import GPT2


def test_the_kernels_give_the_text_of_the_torch_path() -> None:
    """Prompts of several lengths with a common beginning, more of them than rows, one up to the context's end."""
    narrow = GPT2(SHAPES["wider"])
    narrow.load_state_dict(model("wider").state_dict())
    prompts = with_beginning(3, [1, 4, 2, 34], seed=0)

    def said(impl: str, decoder: Decoder) -> list[list[int]]:
        rest = {"max_new_tokens": 12, "stop": NO_STOP, "batch_size": 3}
        return in_order(decode(narrow, prompts, impl=impl, decoder=decoder, **rest))

    by_kernels = said("triton", "slots")
    assert by_kernels == said("cpu", "ragged")
    assert [len(ids) for ids in by_kernels] == [12, 12, 12, 4]
    assert len({token for ids in by_kernels for token in ids}) > 6
