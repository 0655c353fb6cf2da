from __future__ import annotations

import pytest
import torch
from fastft_kernels import add_rows_, linear_cross_entropy, plan_rows, prepare_compile, registry, take_rows
from torch import Tensor

ROWS = torch.tensor([1, 0, 1])


def test_every_operation_has_a_lowering_once_it_is_prepared() -> None:
    from torch._inductor import lowering

    ours = list(registry._bodies)
    assert {made.name() for made in ours} >= {"fastft_kernels::gelu_forward", "fastft_kernels::rows_add"}
    for made in ours:
        lowering.lowerings.pop(made, None)
    prepare_compile()
    found = {made: lowering.lowerings[made] for made in ours}
    prepare_compile()
    assert all(lowering.lowerings[made] is it for made, it in found.items())


def test_prepared_operations_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a fallback of inductor's own making, which writes the whole graph down in torch 2.11."""
    from torch._inductor import graph

    prepare_compile()
    monkeypatch.setattr(graph, "make_fallback", None)
    plan = plan_rows(ROWS)

    def run(x: Tensor, total: Tensor) -> Tensor:
        y = take_rows(x, ROWS, plan=plan, impl="torch")
        return y + add_rows_(total, y.detach(), plan, "torch")[:1]

    x, total = torch.eye(2, 3, requires_grad=True), torch.zeros(2, 3)
    expected = run(x, total.clone())
    found = torch.compile(run, fullgraph=True)(x, total)
    assert torch.equal(found, expected)
    assert total.tolist() == [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]
    (dx,) = torch.autograd.grad(found.sum(), x)
    assert dx.tolist() == [[1.0] * 3, [2.0] * 3]


def test_a_write_is_noted() -> None:
    total = torch.zeros(2, 3)
    before = total._version
    add_rows_(total, torch.ones(3, 3), plan_rows(ROWS))
    assert total._version == before + 1
    weight = torch.ones(2, 3, requires_grad=True)
    kept = (weight * total).sum()  # keeps the total for the gradient
    add_rows_(total, torch.ones(3, 3), plan_rows(ROWS))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_a_gradient_has_none() -> None:
    x = torch.eye(2, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(take_rows(x, ROWS).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()


def test_a_penalty_on_gradients_of_a_fused_loss_is_no_zero() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    head = torch.randn(16, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, head, torch.arange(4), impl="torch")
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    assert torch.isfinite(gradient).all()  # that alone is what an optimizer with create_graph=True may read
    with pytest.raises(RuntimeError, match="differentiable once"):
        (hidden.sum() + gradient.square().sum()).backward()


def test_an_operation_of_ones_own() -> None:
    @registry.operation("test_scale")
    def scale(x: Tensor, factor: float) -> Tensor:
        return x * factor

    @registry.fake(scale)
    def _(x: Tensor, factor: float) -> Tensor:
        return torch.empty_like(x)

    def save(ctx, inputs, output):
        ctx.factor = inputs[1]

    registry.differentiable(scale, save=save, gradient=lambda ctx, dy: (dy * ctx.factor, None))
    x = torch.ones(3, requires_grad=True)
    torch.library.opcheck(scale, (x, 2.5))
    scale(x, 2.5).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.5] * 3
    with torch.no_grad():
        assert not scale(x, 2.5).requires_grad
    assert not scale(x.detach(), 2.5).requires_grad

    @registry.operation("test_alias")
    def alias(x: Tensor) -> Tensor:
        return x.view(-1)

    with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError, match="alias"):
        torch.library.opcheck(alias, (torch.ones(3),), test_utils="test_schema")
