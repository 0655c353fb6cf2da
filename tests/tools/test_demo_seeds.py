"""What the demo reaches: which runs are made, that a killed call goes on, and what the page's tables say."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fastft import demo as demo_module
from fastft.demo import DemoOptions, demo_run
from fastft.run.config import TrainOptions
from tools import demo_seeds
from tools.demo_seeds import ARITHMETICS, CHOOSING, SEEDS, SETTINGS, Setting

PAGE = Path(__file__).parents[2] / "docs/demo.md"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with the smallest model."""

    def shorter(options: DemoOptions, full=demo_run) -> TrainOptions:
        return replace(full(options), model="pico")

    monkeypatch.setattr(demo_module, "demo_run", shorter)
    monkeypatch.setattr(demo_seeds, "demo_run", shorter)


def test_runs_are_kept_and_a_killed_call_goes_on(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole demo once, on 32 examples; the second call runs nothing again, and the table goes into the page."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- seeds -->\nold\n<!-- end of seeds -->\nafter\n")
    given = ["seeds", "--out", str(tmp_path / "out"), "--examples", "32", "--page", str(page)]
    demo_seeds.main([*given, "--only", "1"])
    (line,) = map(json.loads, (tmp_path / "out/runs.jsonl").read_text().splitlines())
    assert (line["seed"], line["dtype"], line["n"], line["examples"]) == (1, ARITHMETICS[0], 144, 32)
    assert line["best_val_loss"] <= line["last_val_loss"]
    monkeypatch.setattr(demo_seeds, "demo", lambda _: pytest.fail("a finished run was run again"))
    demo_seeds.main([*given, "--only", "0"])
    text = page.read_text()
    assert text.startswith("before\n<!-- seeds -->\n\n| Arithmetic | Seed |")
    assert text.endswith("<!-- end of seeds -->\nafter\n")
    assert "old" not in text
    assert f"| {ARITHMETICS[0]} | 1 | " in text
    assert "**Of about 32 training examples only.** 1 of 10 runs so far." in text


def test_a_setting_is_tried_without_the_test_split(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_seeds, "demo", lambda _: pytest.fail("the demo answers the test split"))
    (row,) = demo_seeds.finished_rows("settings", tmp_path, 8, only=1)
    assert row["setting"] == asdict(SETTINGS[0])
    assert not any("exact" in name for name in row)


def setting_row(setting: Setting, seed: int, dtype: str, loss: float, seconds: float = 40.0) -> dict[str, Any]:
    return {
        "setting": asdict(setting), "seed": seed, "dtype": dtype, "best_val_loss": loss / 2, "last_val_loss": loss,
        "seconds": seconds, "examples": None, "processor": "CPU", "threads": 2, "fastft": "1",
    }  # fmt: skip


def test_the_least_mean_loss_of_whole_and_fast_settings_is_chosen() -> None:
    a, b, c, d = SETTINGS[:4]
    rows = [
        *(setting_row(a, *one, loss) for one, loss in zip(CHOOSING, (0.5, 0.7), strict=True)),
        *(setting_row(b, *one, loss) for one, loss in zip(CHOOSING, (0.4, 0.9), strict=True)),
        *(setting_row(c, *one, 0.8) for one in CHOOSING),
        setting_row(d, *CHOOSING[0], 0.1),  # not run for all
    ]
    assert demo_seeds.chosen(rows) == a
    assert demo_seeds.chosen([]) is None
    table = demo_seeds.settings_table(rows)
    assert f"| **{a}** | 0.6000 (0.5000 to 0.7000) | 0.3000 |" in table
    assert table.count("**") == 2


def test_median_and_spread_of_each_arithmetic() -> None:
    rows = [
        {**setting_row(SETTINGS[0], seed, dtype, 0.5, 100.0 + seed), "exact_match": 80.0 + seed}
        for dtype in ARITHMETICS
        for seed in SEEDS
    ]
    table = demo_seeds.seeds_table(rows)
    assert table.count("| median of 5 (least to most) | 83.0 (81.0 to 85.0) | 0.2500 (0.2500 to 0.2500) |") == 2
    assert table.count("\n| fp32 | ") == len(SEEDS)
    assert "CPU, 2 threads" in table


def test_seeds_that_are_measured_chose_nothing_and_the_demo_trains_as_the_page_says() -> None:
    assert not {seed for seed, _ in CHOOSING} & {*SEEDS, DemoOptions().seed}
    assert Setting.of(demo_run(DemoOptions())) in SETTINGS
    bold = re.findall(r"(?m)^\| \*\*(rate .*?)\*\* \|", PAGE.read_text())
    assert bold in ([], [str(Setting.of(demo_run(DemoOptions())))])  # none where it was not run to its end yet
