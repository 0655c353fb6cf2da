"""The rows of tokens that a template has added, trained while the rest of the embedding stays.

The frozen weight `[V, C]` holds the rows' values, so that lookup and head read one tensor; the parameters' own values
are written into it before it is read. Of its gradient `[V, C]` only these rows are wanted: they are computed by
themselves, from the few tokens that look them up, and from the head's probabilities of them.

Letters: T tokens, R loss rows, V vocab, C width, n new rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class NewRows(nn.Module):
    """Rows `first` to `first + n` of a model's embedding, and of its head where that has weights of its own.

    Attributes:
        first: the first one.
        wte: `[n, C]`.
        lm_head: `[n, C]`; None where the head is tied.
    """

    def __init__(self, first: int, n: int, wte: Tensor, lm_head: Tensor | None) -> None:
        """Begins with the rows as they are.

        Args:
            first: see above.
            n: how many.
            wte: `[V, C]`, the embedding, which stays.
            lm_head: `[V, C]`, the head, where it has weights of its own.
        """
        super().__init__()
        self.first, self.n = first, n
        self.wte = nn.Parameter(wte.detach()[first : first + n].clone())
        self.lm_head = None if lm_head is None else nn.Parameter(lm_head.detach()[first : first + n].clone())

    @property
    def of_head(self) -> nn.Parameter:
        """`[n, C]`: what the head reads."""
        return self.wte if self.lm_head is None else self.lm_head

    @torch.no_grad()
    def write(self, wte: Tensor, lm_head: Tensor | None) -> None:
        """Writes the rows into the weights `[V, C]` that they belong to."""
        wte[self.first : self.first + self.n] = self.wte
        if lm_head is not None and self.lm_head is not None:
            lm_head[self.first : self.first + self.n] = self.lm_head

    def into(self, weight: Tensor, rows: Tensor) -> Tensor:
        """`[V, C]`: a copy of a weight with `rows` `[n, C]` in their places; the gradient passes to them."""
        at = torch.arange(self.first, self.first + self.n, device=weight.device)
        return weight.index_copy(0, at, rows.to(weight.dtype))

    def looked_up(self, found: Tensor, tokens: Tensor) -> Tensor:
        """`[T, C]` of the embedding, for `tokens` `[T]`, as it is: its gradient reaches the new rows."""
        return cast(Callable[..., Tensor], _LookedUp.apply)(found, self.wte, tokens, self.first)

    def judged(
        self, loss: Tensor, losses: Tensor, hidden: Tensor, head: Tensor, targets: Tensor, row_weights: Tensor
    ) -> Tensor:
        """The loss, as it is, whose gradient reaches the new rows through the head.

        Args:
            loss: the sum of the rows' losses by their weights, a scalar.
            losses: of each row, `[R]`, without gradient.
            hidden: `[R, C]`, what the head read.
            head: `[V, C]`, whose rows these are.
            targets: `[R]` int64; below 0 where a row has none.
            row_weights: `[R]`.
        """
        apply = cast(Callable[..., Tensor], _Judged.apply)
        return apply(loss, self.of_head, losses, hidden.detach(), head.detach(), targets, row_weights, self.first)


class _LookedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, found: Tensor, rows: Tensor, tokens: Tensor, first: int) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.first, ctx.n, ctx.dtype = first, len(rows), rows.dtype
        return found.view_as(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        which = torch.arange(ctx.first, ctx.first + ctx.n, device=tokens.device)
        dy = grads[0]
        wide = torch.promote_types(dy.dtype, torch.float32)
        # A product with zeros and ones: in a fixed order, and of few rows.
        d_rows = (tokens[None, :] == which[:, None]).to(wide) @ dy.to(wide)
        return dy if ctx.needs_input_grad[0] else None, d_rows.to(ctx.dtype), None, None


class _Judged(torch.autograd.Function):
    """With z the logits of a row and t its target, the gradient of `w (logsumexp(z) - z[t])` to the row `j` of the head
    is `w (p[j] - (j == t)) h`, and `p[j] = exp(z[j] - z[t] - loss)`."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, rows: Tensor, losses: Tensor, hidden: Tensor, head: Tensor, targets: Tensor,
        row_weights: Tensor, first: int,
    ) -> Tensor:  # fmt: skip
        wide = torch.promote_types(hidden.dtype, torch.float32)
        judged, at = targets >= 0, targets.clamp(min=0)
        h = hidden.to(wide)
        own = (h * head.index_select(0, at).to(wide)).sum(-1)
        p = (h @ rows.detach().to(hidden.dtype).to(wide).t() - (own + losses)[:, None]).exp()
        which = torch.arange(first, first + len(rows), device=targets.device)
        p -= (at[:, None] == which[None, :]).to(wide)
        p *= torch.where(judged, row_weights.to(wide), 0.0)[:, None]
        ctx.save_for_backward((p.t() @ h).to(rows.dtype))
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_rows,) = ctx.saved_tensors
        return (grads[0], d_rows * grads[0], None, None, None, None, None, None)
