"""Options about the judge that can have no effect are refused: each is in the table, with each thing that it needs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fastft.common.errors import UserError
from fastft.common.options import table
from fastft.judging.options import JudgeOptions
from fastft.scores.compare import CompareOptions
from fastft.scores.score import ScoreOptions

OPENAI = {"judge": "openai", "judge_url": "http://x"}
GIVEN: dict[str, Any] = {
    "judge": "openai", "judge_model": "phi3", "judge_url": "http://x", "judge_key_env": "KEY", "judge_tokens": 6000,
    "judge_timeout": 1.0, "judge_load_timeout": 1.0, "judge_total_timeout": 130.0, "judge_retries": 1,
    "judge_pause": 1.0, "pull": True, "require_judge": True, "judge_style": "reason", "judge_rubric": Path("x"),
    "judge_parallel": 2,
}  # fmt: skip
"""Of each option another value than its default."""
WITH: dict[str, dict[str, Any]] = {"judge": OPENAI, "judge_key_env": OPENAI}
"""Beside which other options one has an effect, where the defaults are not enough."""
WITHOUT: dict[str, list[dict[str, Any]]] = {
    "judge_key_env": [{"judge": "ollama"}],
    "judge_timeout": [{"judge_timeout": 601.0}, {"judge_timeout": 119.0, "judge_total_timeout": 100.0}],
    "judge_pause": [{"judge_retries": 0}],
    "pull": [OPENAI],
}
"""Beside which an option has none, though somebody is asked."""
CONDITIONS = {one.name: one.needs for one in table(ScoreOptions) if one.needs}
OF_SCORE_ALONE = {one.name for one in fields(ScoreOptions)} - {one.name for one in fields(JudgeOptions)}
OF_NO_JUDGE = {"run", "name", "data"}


def scored(**options: Any) -> ScoreOptions:
    return ScoreOptions(run=Path("run"), **options)


def compared(**options: Any) -> CompareOptions:
    return CompareOptions(Path("a"), Path("b"), **options)


def test_every_option_of_a_judge_is_in_the_table() -> None:
    names = {one.name for one in fields(ScoreOptions)} - OF_NO_JUDGE
    assert CONDITIONS.keys() == GIVEN.keys() == names
    compared_as = {one.name: one.needs for one in table(CompareOptions) if one.needs}
    assert compared_as == {name: needs for name, needs in CONDITIONS.items() if name not in OF_SCORE_ALONE}
    assert all(GIVEN[one.name] != one.default for one in fields(ScoreOptions) if one.name in names)


@pytest.mark.parametrize("name", GIVEN)
def test_an_option_has_its_effect_where_somebody_is_asked(name: str) -> None:
    given = {name: GIVEN[name], **WITH.get(name, {})}
    scored(**given)
    if name not in OF_SCORE_ALONE:
        compared(pairwise=True, **given)


@pytest.mark.parametrize("name", [name for name in GIVEN if name != "judge"])
def test_no_option_has_one_where_nobody_is_asked(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"^got --{name} \S+, which has no effect here: it needs a --judge other than none"
    ):
        scored(**{name: GIVEN[name], "judge": "none"})


@pytest.mark.parametrize("name", [name for name in GIVEN if name not in OF_SCORE_ALONE])
def test_no_option_has_one_in_a_comparison_without_pairs(name: str) -> None:
    with pytest.raises(UserError, match=r"^got --\w+ \S+, which has no effect here: it needs --pairwise, which"):
        compared(**{name: GIVEN[name], **WITH.get(name, {})})


@pytest.mark.parametrize(("name", "beside"), [(name, one) for name, cases in WITHOUT.items() for one in cases])
def test_what_takes_an_options_effect_away(name: str, beside: dict[str, Any]) -> None:
    given = {name: GIVEN[name], **beside}
    for made, more in ((scored, {}), (compared, {"pairwise": True})):
        with pytest.raises(UserError, match=f"^got --{name} .*which has no effect here: it needs .*; leave it out"):
            made(**given, **more)


def test_each_condition_has_its_case() -> None:
    n_common = 2  # nobody is asked, in one of two ways
    own = {name: len(all_) - n_common for name, all_ in CONDITIONS.items() if len(all_) > n_common}
    assert own == dict.fromkeys(WITHOUT, 1)


def test_defaults_are_nobodys_mistake() -> None:
    scored(judge="none")
    scored(judge_retries=0)
    scored(judge_total_timeout=60.0)
    compared()
    compared(pairwise=True, judge_retries=0)
