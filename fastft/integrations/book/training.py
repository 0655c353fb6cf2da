"""The book's losses and training loop (chapter 5) over packed batches.

A batch of the book's is rows padded to one length, and its loss is over the logits of all places. Here padding and
what nobody asks is left out, equal beginnings are computed once, and logits exist for the supervised places alone, a
chunk at a time: the same loss and gradients, up to the order of sums. Where dropout draws, the padded rows are
computed, as its random numbers go by place.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fastft.batches.asked import Asked, asked_rows
from fastft.batches.batch import Batch, pack_asked
from fastft.common.console import say
from fastft.common.errors import UserError
from fastft.common.optional import need
from fastft.integrations.book.generation import generate_and_print_sample
from fastft.integrations.book.model import GPTModel, drops, is_known
from fastft.model import ops
from fastft.model.loss import linear_cross_entropy
from fastft.model.precision import NARROW

_IGNORED = -100

Device = torch.device | str


def calc_loss_batch(input_batch: Tensor, target_batch: Tensor, model: nn.Module, device: Device) -> Tensor:
    """The mean cross-entropy of a batch's targets.

    Args:
        input_batch: `[B, W]` int64 token ids.
        target_batch: `[B, W]` int64, the token after each place, or -100 where none is asked for.
        model: a `GPTModel`; any other model that gives logits is called as the book calls it.
        device: the model's.

    Returns:
        A scalar with gradient; NaN where nothing is asked, as in the book.

    Raises:
        UserError: rows longer than the context, or targets that the vocabulary lacks.
    """
    asked = target_batch[target_batch != _IGNORED]
    if not is_known(model) or not len(asked):
        logits = model(input_batch.to(device)).flatten(0, 1)
        return F.cross_entropy(logits, target_batch.to(device).flatten())
    _check_targets(asked, model.out_head)
    if drops(model):
        _say_that_it_drops()
        hidden, targets = model.hidden(input_batch.to(device)).flatten(0, 1), target_batch.to(device).flatten()
        return _mean_loss(model, hidden[targets != _IGNORED], asked.to(device), None)
    model.check_length(input_batch.shape[1])
    rows = [row.trimmed() for row in asked_rows(input_batch, target_batch) if len(row.at)]
    impl = ops.resolve("auto", torch.device(device))
    is_narrow = torch.is_autocast_enabled(torch.device(device).type) or model.tok_emb.weight.dtype in NARROW.values()
    batch = _packed(rows, impl, torch.device(device), is_narrow=is_narrow)
    return _mean_loss(model, model.hidden_of_rows(batch, impl), batch.targets, batch.weights)


def _packed(rows: Sequence[Asked], impl: str, device: torch.device, *, is_narrow: bool) -> Batch:
    """The rows as one pack on the model's device, of the sizes of `ops.rounding`."""
    planner = ops.planner(impl, round_sizes=device.type == "cuda")
    batch = pack_asked(rows, rounding=ops.rounding(device, is_narrow=is_narrow), planner=planner)
    return batch.to(device)


def _mean_loss(model: GPTModel, hidden: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of the losses of final hidden states `[R, C]` by their weights `[R]`."""
    head: Any = model.out_head
    if type(head) is nn.Linear and getattr(head, "bias", None) is None:
        return linear_cross_entropy(hidden, head.weight, targets, row_weights=weights)
    losses: Tensor = F.cross_entropy(head(hidden), targets, reduction="none")  # another one, such as LoRA's
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()


def _check_targets(asked: Tensor, head: nn.Module) -> None:
    least, most = asked.aminmax()
    V = getattr(head, "out_features", int(most) + 1)
    if least < 0 or most >= V:
        raise UserError(
            f"got targets from {int(least)} to {int(most)}, expected 0 to {V - 1} or {_IGNORED}; use the tokenizer "
            "that the model's vocab_size is of"
        )


@functools.cache
def _say_that_it_drops() -> None:
    say(
        "dropout draws while training (drop_rate > 0): batches stay padded, as its random numbers go by place; "
        "with drop_rate 0.0, as in chapter 7, they are packed, which is faster"
    )


def calc_loss_loader(
    data_loader: DataLoader[Any], model: nn.Module, device: Device, num_batches: int | None = None
) -> float:
    """The mean of the losses of the first `num_batches` batches, or of all; NaN without any."""
    if not len(data_loader):
        return float("nan")
    most = len(data_loader) if num_batches is None else min(num_batches, len(data_loader))
    total = 0.0
    for i, (input_batch, target_batch) in enumerate(data_loader):
        if i >= most:
            break
        total += calc_loss_batch(input_batch, target_batch, model, device).item()
    return total / most


def evaluate_model(
    model: nn.Module, train_loader: DataLoader[Any], val_loader: DataLoader[Any], device: Device, eval_iter: int
) -> tuple[float, float]:
    """The losses of the first `eval_iter` batches of both loaders; the model is left in training mode."""
    model.eval()
    with torch.no_grad():
        train_loss = calc_loss_loader(train_loader, model, device, num_batches=eval_iter)
        val_loss = calc_loss_loader(val_loader, model, device, num_batches=eval_iter)
    model.train()
    return train_loss, val_loss


def train_model_simple(
    model: nn.Module,
    train_loader: DataLoader[Any],
    val_loader: DataLoader[Any],
    optimizer: torch.optim.Optimizer,
    device: Device,
    num_epochs: int,
    eval_freq: int,
    eval_iter: int,
    start_context: str,
    tokenizer: Any,
) -> tuple[list[float], list[float], list[int]]:
    """Trains, evaluates after steps 0, `eval_freq`, ..., and prints a sample after each epoch.

    Returns:
        Losses of the training and of the validation loader, and the places seen until then, padding among them.
    """
    train_losses: list[float] = []
    val_losses: list[float] = []
    track_tokens_seen: list[int] = []
    tokens_seen, global_step = 0, -1
    for epoch in range(num_epochs):
        model.train()
        for input_batch, target_batch in train_loader:
            optimizer.zero_grad()
            calc_loss_batch(input_batch, target_batch, model, device).backward()
            with _fused(optimizer):
                optimizer.step()
            tokens_seen += input_batch.numel()
            global_step += 1
            if global_step % eval_freq == 0:
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, device, eval_iter)
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                track_tokens_seen.append(tokens_seen)
                print(f"Ep {epoch + 1} (Step {global_step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
        generate_and_print_sample(model, tokenizer, device, start_context)
    return train_losses, val_losses, track_tokens_seen


@contextlib.contextmanager
def _fused(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Lets a plain Adam or AdamW on a CPU step in one pass over memory; what its user has chosen is left alone."""
    groups = [group for group in optimizer.param_groups if _may_be_fused(optimizer, group)]
    for group in groups:
        group["fused"] = True
    try:
        yield
    finally:
        for group in groups:
            group["fused"] = None


def _may_be_fused(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    return (
        type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        and group["fused"] is None
        and group["foreach"] is None
        and not (group["capturable"] or group["differentiable"])
        and isinstance(group["lr"], float)
        and all(p.device.type == "cpu" and p.is_floating_point() for p in group["params"])
    )


def plot_losses(epochs_seen: Any, tokens_seen: Any, train_losses: Sequence[float], val_losses: Sequence[float]) -> None:
    """Draws both losses against epochs and tokens into `loss-plot.pdf`, and shows them.

    Raises:
        UserError: matplotlib is not installed.
    """
    need("matplotlib", extra="plots")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(5, 3))
    axes.plot(epochs_seen, train_losses, label="Training loss")
    axes.plot(epochs_seen, val_losses, linestyle="-.", label="Validation loss")
    axes.set_xlabel("Epochs")
    axes.set_ylabel("Loss")
    axes.legend(loc="upper right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tokens = axes.twiny()
    tokens.plot(tokens_seen, train_losses, alpha=0)  # unseen: it makes the ticks of the second axis fit
    tokens.set_xlabel("Tokens seen")
    figure.tight_layout()
    pyplot.savefig("loss-plot.pdf")
    pyplot.show()
