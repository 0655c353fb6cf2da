"""The attention implementation `fastft`, for any causal model of transformers that looks its attention up by name.

Two halves are registered. The mask half is asked once a forward pass, and answers with an interval, `[B, T]` integers,
where others make a mask of T x T entries; without it transformers passes None on, and padding vanishes unnoticed. The
attention half is called by each layer.

What is no interval (a window that bites, chunks, masks of one's own) and decoding over a cache go to torch's attention
with the full mask, exactly as under `sdpa`; what torch's attention would leave out as well is refused.

Letters: B rows of T tokens, H query heads, G heads of keys and values, D head dim.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fastft.common.errors import UserError
from fastft.common.optional import need
from fastft.integrations.transformers import intervals, ops

NAME = "fastft"
MaskFunction = Callable[..., Any]
Function = TypeVar("Function", bound=Callable[..., Any])


def _not_compiled(function: Function) -> Function:
    """Left out of the graphs of torch.compile: what it plans depends on values."""
    return cast(Function, torch.compiler.disable(function))


def register() -> None:
    """Makes `attn_implementation="fastft"` known, in `from_pretrained` and `set_attn_implementation`.

    A layer then takes beside padding (`attention_mask`) and packed sequences (`position_ids` that restart, or
    `cu_seq_lens_q`) also `visible_until` `[B, T]` integers: key k is visible to query q exactly when
    `k <= q < visible_until[k]`, which says shared beginnings too.

    Raises:
        UserError: transformers is not installed.
    """
    need("transformers", extra="transformers")
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, interval_mask)


@_not_compiled
def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask half: `[B, T]` int32 intervals, None for rows that are causal and whole, or sdpa's mask.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset: B, and which queries meet which keys; the offset of
            queries is a tensor for some caches.
        mask_function: says of indices whether a query sees a key; taken apart, not called.
        attention_mask: `[B, T]`, nonzero where a token is real.
        kwargs: what else transformers tells sdpa's.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    _forget_devices()
    mask_function = causal_mask_function if mask_function is None else mask_function
    square = q_length == kv_length and isinstance(q_offset, int) and q_offset == 0 == kv_offset
    if square and not ops.is_recorded() and (attention_mask is None or attention_mask.shape[-1] == kv_length):
        parts = _parts(mask_function, q_length)
        if parts == ():
            return None if attention_mask is None else _as_padding(intervals.of_padding(attention_mask))
        if parts is not None and attention_mask is None:
            return intervals.of_sequences(parts[0])
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, **kwargs,
    )  # fmt: skip
    return mask


def _as_padding(until: Tensor) -> Tensor:
    """Notes of intervals that they come of an attention mask, which nothing else that says what is seen may hide."""
    until.is_padding = True  # type: ignore[attr-defined] # tensors take attributes of one's own
    return until


def _hides(mask: Tensor, T: int) -> bool:
    """Whether intervals come of an attention mask, and have padding."""
    return getattr(mask, "is_padding", False) and bool((mask != T).any())


def _parts(mask_function: MaskFunction, T: int) -> tuple[Tensor, ...] | None:
    """Takes transformers' mask functions apart: () where it is causal, the sequences `[B, T]` where it is causal within
    each of them, None where it is anything else, or nothing known.

    A function of another name, in another version, is unknown: the full mask is then made, slower and as right.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is causal_mask_function:
        return ()
    name = getattr(mask_function, "__qualname__", "")
    held = _closure(mask_function)
    if name == "and_masks.<locals>.and_mask":
        return _parts_of_both(held.get("mask_functions", ()), T)
    if name == "packed_sequence_mask_function.<locals>.inner_mask":
        return (held["packed_sequence_mask"],)
    if name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        inner = held["mask_function"]
        return () if inner is causal_mask_function else _parts(inner, int(held["position_ids"].max()) + 1)
    if name == "sliding_window_overlay.<locals>.inner_mask" and held["sliding_window"] >= T:
        return ()  # the window is wider than what there is to see; `and` brings causality
    return None


def _parts_of_both(functions: tuple[MaskFunction, ...], T: int) -> tuple[Tensor, ...] | None:
    found: tuple[Tensor, ...] = ()
    for function in functions:
        parts = _parts(function, T)
        if parts is None or (found and parts):
            return None
        found = found or parts
    return found if any(_is_causal(function) for function in functions) else None


def _is_causal(function: MaskFunction) -> bool:
    """Whether a mask function alone lets no query see a later key."""
    from transformers.masking_utils import causal_mask_function

    held = _closure(function)
    inner = held.get("mask_functions", ()) or ((held["mask_function"],) if "mask_function" in held else ())
    return function is causal_mask_function or any(_is_causal(one) for one in inner)


def _closure(function: MaskFunction) -> dict[str, Any]:
    """What a function has from where it was made, by name."""
    code, cells = (getattr(function, name, None) for name in ("__code__", "__closure__"))
    if code is None or cells is None:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


@_not_compiled
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention half, in transformers' own form.

    Args:
        module: the layer that asks.
        query, key, value: `[B, H, T, D]`, `[B, G, T, D]` twice.
        attention_mask: what `interval_mask` gave, or a mask `[B, 1, T, S]` of one's own.
        dropout: of the probabilities; anything but 0 goes to torch's attention.
        scaling: of the scores; `1 / sqrt(D)` where it is not given.
        is_causal: False is refused.
        kwargs: `visible_until`, `cu_seq_lens_q`, `position_ids`, and what is refused.

    Returns:
        `[B, T, H, D]`, and None for the probabilities.

    Raises:
        UserError: something asked for that would be left out.
    """
    _refuse(module, is_causal, kwargs)
    tree = kwargs.get("visible_until")
    if ops.is_recorded():  # nothing may be asked of values there: sdpa's mask, which interval_mask gave
        if tree is not None or kwargs.get("cu_seq_lens_q") is not None:
            raise UserError(
                "got visible_until or cu_seq_lens_q in torch.export, torch.jit or torch.func, expected rows that are "
                "padded"
            )
        return _by_sdpa(module, query, key, value, attention_mask, dropout, scaling)
    full_mask = attention_mask is not None and attention_mask.ndim == 4
    if full_mask or query.shape[2] != key.shape[2]:
        if tree is not None:
            raise UserError(
                "got visible_until with a cache, a sliding window that is shorter than a sequence or a mask of another "
                "kind, expected a plain causal layer without a cache: use_cache=False, or a collator without sharing"
            )
        return _by_sdpa(module, query, key, value, attention_mask, dropout, scaling)
    until = _until(query, attention_mask, kwargs)
    if dropout:
        if tree is not None:
            raise UserError(
                f"got attention dropout {dropout:g} with visible_until, expected 0, as a shared token has one mask for "
                "all that share it: zero_dropout(model)"
            )
        mask = None if until is None else intervals.visible(until)
        return _by_sdpa(module, query, key, value, mask, dropout, scaling)
    B, H, T, D = query.shape
    query, key, value = _in_autocast(query, key, value)
    q, k, v = (x.transpose(1, 2).reshape(B * T, -1, x.shape[-1]) for x in (query, key, value))
    out = ops.attention(q, k, v, _plan(q, until, B, T), 1 / math.sqrt(D) if scaling is None else scaling)
    return out.view(B, T, H, D), None


REFUSED = {
    "softcap": "soft caps of the scores",
    "s_aux": "attention sinks",
    "position_bias": "biases of the scores",
    "cache": "paged caches",
}
"""Arguments of a layer that change what it computes, and that would be left out."""


def _refuse(module: nn.Module, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None:
            raise UserError(
                f'got {what} ({name}), which attn_implementation="fastft" does not compute: '
                'model.set_attn_implementation("eager"), or what the model recommends'
            )
    if getattr(module, "reorder_and_upcast_attn", False):
        raise UserError(
            'got reorder_and_upcast_attn, which attn_implementation="eager" alone computes, expected it False'
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and getattr(getattr(module, "config", None), "is_causal", True)  # of models made bidirectional
    if not causal or getattr(module, "is_cross_attention", False):
        raise UserError(
            f"got {type(module).__name__}, which is not causal self-attention, expected a causal language model: "
            'model.set_attn_implementation("sdpa")'
        )


def _in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype of autocast where it is on, as torch casts for its own: rotary positions make queries and
    keys float32, and values stay narrow."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _by_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float,
    scaling: float | None,
) -> tuple[Tensor, None]:  # fmt: skip
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    ops.note("attention_sdpa")
    out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)
    return out, None


def _until(query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    """The intervals `[B, T]` that a layer's arguments ask for; None where the rows are causal and whole."""
    B, _, T, _ = query.shape
    tree, ends, positions = (kwargs.get(name) for name in ("visible_until", "cu_seq_lens_q", "position_ids"))
    found: Tensor | None = None
    if (tree is not None or ends is not None) and mask is not None and _hides(mask, T):
        other = "cu_seq_lens_q" if tree is None else "visible_until"
        raise UserError(f"got {other} beside an attention_mask with padding, expected one to say what is seen")
    if tree is not None:
        found = _remembered(tree, lambda: _checked(tree, "visible_until", B, T), "visible_until", B, T)
    elif ends is not None:
        if B != 1:
            raise UserError(f"got cu_seq_lens_q with {B} rows, expected one row of packed sequences")
        found = _remembered(ends, lambda: intervals.of_cu_seqlens(ends, T), "cu_seq_lens_q", T)
    elif mask is not None:
        found = _remembered(mask, lambda: _checked(mask, "a layer's attention mask", B, T), "mask", B, T)
    elif positions is not None and positions.ndim == 2 and positions.shape[1] == T:
        found = _remembered(positions, lambda: _of_restarts(positions, B), "position_ids", B)
    return found


def _checked(until: Tensor, name: str, B: int, T: int) -> Tensor:
    place = torch.arange(T, device=until.device)
    integers = not until.is_floating_point() and until.dtype != torch.bool
    if not integers or until.shape != (B, T) or bool(((until < place) | (until > T)).any()):
        raise UserError(
            f"got {name} {tuple(until.shape)} {until.dtype}, expected [{B}, {T}] integers, each from its own place to "
            f"{T}"
        )
    return until.to(torch.int32)


def _of_restarts(positions: Tensor, B: int) -> Tensor | None:
    """The intervals of positions that restart; None where none does."""
    if bool((positions.diff(dim=1) == 1).all()):
        return None
    return intervals.of_positions(positions.expand(B, -1))


_memory: OrderedDict[tuple[Any, ...], tuple[Tensor, Any]] = OrderedDict()
_lock = threading.RLock()  # DataParallel calls from several threads
REMEMBERED = 16
"""Results kept: of a forward pass and its recomputation, every layer asks the same."""


def _remembered(of: Tensor, make: Callable[[], Any], *what: Any) -> Any:
    """What `make` gives, made once for what a tensor says.

    On a CPU it is known by its values. Elsewhere a look at them would wait for the device: there it is known by its
    memory and torch's count of writes, until the next forward pass, as that count misses writes through `.data`. The
    tensor is held as well, so that its memory cannot become another one's meanwhile.
    """
    known: tuple[Any, ...]
    if of.device.type == "cpu":
        known = (of.detach().numpy().tobytes(),)
    elif of.is_inference():  # such tensors do not count
        return make()
    else:
        known = (of.data_ptr(), of._version, of.stride())
    key = (of.device, of.dtype, tuple(of.shape), *known, *what)
    with _lock:
        if key not in _memory:
            with torch.inference_mode(False):  # what is made in evaluation serves training too, which saves it
                _memory[key] = (of, make())
        _memory.move_to_end(key)
        while len(_memory) > REMEMBERED:
            _memory.popitem(last=False)
        return _memory[key][1]


def _forget_devices() -> None:
    """At the beginning of a forward pass, which asks for its mask once: what is known by its memory alone."""
    with _lock:
        for key in [key for key in _memory if key[0].type != "cpu"]:
            del _memory[key]


def _plan(q: Tensor, until: Tensor | None, B: int, T: int) -> ops.Plan:
    if until is None:
        return ops.plan_rows_of(q, B, T)
    wanted = (str(q.dtype), q.device, q.shape[-1])
    plan: ops.Plan = _remembered(until, lambda: ops.plan(q, intervals.end_to_end(until)), "plan", *wanted)
    return plan
