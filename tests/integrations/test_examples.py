"""The examples run as they stand, and what they accelerate does run, as often as it should."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from fastft.integrations.transformers import counted
from fastft.integrations.transformers.loss import CausalLM
from fastft.integrations.transformers.speedup import base_of

pytest.importorskip("accelerate", reason="pip install 'fastft[transformers]'")
EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {"transformers_trainer.py": "transformers", "peft_lora.py": "peft", "trl_sft.py": "trl"}
STEPS = 3


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_trains(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(NEEDS[name], reason=f"pip install 'fastft[{NEEDS[name]}]'")
    torch.manual_seed(0)
    main = runpy.run_path(str(EXAMPLES / name))["main"]
    with counted() as ran:
        trainer: Any = main(["--steps", str(STEPS), "--out", str(tmp_path)])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert isinstance(base_of(trainer.model), CausalLM)
    assert "rows with a label alone" in capsys.readouterr().out
    # Each op once a step and layer, twice where TRL checkpoints activations, as it does if it is not told otherwise;
    # `accelerate` tries out attention, then GELU, then the loss, and the collator tries the model out six times.
    layers, times = 2, 2 if name == "trl_sft.py" else 1
    assert ran["loss"] == STEPS + 1
    assert ran["attention"] == layers * (STEPS * times + 2 + 6)
    assert ran["gelu"] == layers * (STEPS * times + 1 + 6)
    assert ran["attention_sdpa"] == 0
