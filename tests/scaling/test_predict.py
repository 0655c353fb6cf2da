"""The predicted costs of a step; one of them is a bar of ours, over the book's data."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastft_kernels import roofline

from fastft.batches.batch import Batcher
from fastft.common.errors import UserError
from fastft.model.gpt2 import config_for
from fastft.scaling import predict


@pytest.fixture(scope="module")
def sample_costs() -> dict[str, roofline.Cost]:
    encoded = predict.training_set("sample")
    return predict.step_costs(config_for("gpt2-medium"), predict.packed_batch(encoded, 64))


def test_the_matrix_products_are_six_times_the_weights_they_read(sample_costs: dict[str, roofline.Cost]) -> None:
    """2 operations a weight and token forward, 4 backward; the last block's, but for keys and values, on loss rows."""
    batch = predict.packed_batch(predict.training_set("sample"), 64)
    T, R, C, L = batch.tokens.numel(), batch.rows.numel(), 1024, 24
    expected = 6 * (12 * C * C * ((L - 1) * T + R) + 2 * C * C * (T - R))
    assert sample_costs["matrix products"].matrix_flops == expected


def test_a_faster_card_needs_less_time(sample_costs: dict[str, roofline.Cost]) -> None:
    times = {card: predict.predicted_seconds(sample_costs.values(), card) for card in roofline.CARDS}
    assert times["H100"] < times["A100"] < times["L4"]
    assert all(cost.bytes > 0 and cost.launches > 0 for cost in sample_costs.values())


def test_a_batch_without_the_kernels_plan_is_refused() -> None:
    batch = Batcher()(predict.training_set("sample"), predict.np.arange(4))
    with pytest.raises(ValueError, match="plan for the kernels"):
        predict.step_costs(config_for("nano"), batch)


def test_our_loss_moves_and_multiplies_at_most_half_of_ligers(book_data: Path) -> None:
    """64 examples of the book's data, prompt masked: ours over the packed batch, Liger's over the padded one."""
    encoded = predict.training_set(str(book_data))
    ours = predict.packed_batch(encoded, 64)
    padded = Batcher(packed=False)(encoded, predict.np.arange(64))
    for C in (768, 1024):
        cost = roofline.linear_cross_entropy_cost(ours.rows.numel(), C, 50257, 2, T=ours.tokens.numel())
        cost += roofline.linear_cross_entropy_cost(ours.rows.numel(), C, 50257, 2, T=ours.tokens.numel(), backward=True)
        ligers = roofline.liger_linear_cross_entropy_cost(padded.tokens.numel(), padded.count, C, 50257, 2)
        assert cost.bytes <= 0.5 * ligers.bytes
        assert cost.tile_bytes <= 0.5 * ligers.tile_bytes
        assert cost.matrix_flops <= 0.5 * ligers.matrix_flops


def test_the_command_says_that_it_predicts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["predict", "--model", "nano", "--examples", "8"])
    predict.main()
    printed = capsys.readouterr().out
    assert "PREDICTED, not measured" in printed
    assert "whole step" in printed


@pytest.mark.parametrize("examples", ["0", "1225"])
def test_examples_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch, examples: str) -> None:
    monkeypatch.setattr("sys.argv", ["predict", "--model", "nano", "--examples", examples])
    with pytest.raises(UserError, match=f"got --examples {examples}, expected 1 to the 1224 of the training split"):
        predict.main()
