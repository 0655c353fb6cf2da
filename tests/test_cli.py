"""The command line: where options come from, and what comes first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastft.cli import COMMANDS, main, parse
from fastft.common.version import __version__
from fastft.run.config import BOOK_RECIPE, TrainOptions, to_yaml
from fastft.scores.compare import CompareOptions


def test_defaults_recipe_config_and_options_in_this_order(tmp_path: Path) -> None:
    assert parse("train", []) == TrainOptions()
    book = parse("train", ["--recipe", "book", "--model", "gpt2"])
    assert {name: getattr(book, name) for name in BOOK_RECIPE} == {**BOOK_RECIPE, "model": "gpt2"}
    config = tmp_path / "run.yaml"
    config.write_text("lr: 0.001\nbatch_size: 4\n")
    assert parse("train", ["--config", str(config), "--batch_size", "2"]) == TrainOptions(lr=0.001, batch_size=2)


def test_a_recipe_named_in_a_config_file_sets_its_defaults(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("recipe: book\nmodel: pico\n")
    options = parse("train", ["--config", str(config)])
    assert (options.tie_head, options.drop_last, options.model) == (False, True, "pico")


def test_a_runs_config_runs_it_again(tmp_path: Path) -> None:
    options = TrainOptions(lr=0.002, model="nano", tie_head=False, out=tmp_path / "a", steps=7)
    (tmp_path / "config.yaml").write_text(to_yaml(options))
    assert parse("train", ["--config", str(tmp_path / "config.yaml")]) == options


def test_resume_takes_the_options_of_the_run(tmp_path: Path) -> None:
    options = TrainOptions(lr=0.002, model="nano", out=tmp_path, steps=7)
    (tmp_path / "config.yaml").write_text(to_yaml(options))
    resumed = parse("train", ["--resume", "--out", str(tmp_path), "--steps", "9"])
    assert (resumed.lr, resumed.model, resumed.steps, resumed.resume) == (0.002, "nano", 9, True)


@pytest.mark.parametrize("resume", [["--resume", "True"], ["--resume=yes"], ["--resume", "ON"], ["--config", "r.yaml"]])
def test_however_resume_is_said_the_options_of_the_run_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: list[str]
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(TrainOptions(lr=0.002, model="nano", out=tmp_path)))
    (tmp_path / "r.yaml").write_text("resume: true\n")
    monkeypatch.chdir(tmp_path)
    resumed = parse("train", [*resume, "--out", str(tmp_path)])
    assert (resumed.lr, resumed.model, resumed.resume) == (0.002, "nano", True)


@pytest.mark.parametrize(
    ("saved", "given", "expected"),
    [
        ({"steps": 4}, ["--epochs", "5"], (5, None)),
        ({"epochs": 5}, ["--steps", "4"], (2, 4)),
        ({"steps": 4}, [], (2, 4)),
        ({"epochs": 5}, [], (5, None)),
    ],
)
def test_of_steps_and_epochs_the_one_that_is_given_counts(
    tmp_path: Path, saved: dict[str, int], given: list[str], expected: tuple[int, int | None]
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(TrainOptions(out=tmp_path, **saved)))
    resumed = parse("train", ["--resume", "--out", str(tmp_path), *given])
    assert (resumed.epochs, resumed.steps) == expected


@pytest.mark.parametrize(
    ("arguments", "value"),
    [(["--resume"], True), (["--resume", "true"], True), (["--resume=false"], False), (["--resume", "false"], False)],
)
def test_flags(arguments: list[str], value: bool) -> None:
    assert parse("train", [*arguments, "--seed", "1"]).resume is value


@pytest.mark.parametrize(
    "arguments",
    [["a", "b", "--pairwise"], ["--pairwise", "a", "b"], ["a", "--pairwise", "b"], ["--pairwise", "true", "a", "b"]],
)
def test_runs_are_given_by_their_place_around_flags(arguments: list[str]) -> None:
    assert parse("compare", arguments) == CompareOptions(Path("a"), Path("b"), pairwise=True)


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastft {__version__}\n"
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)
    assert main([]) == 2


def test_every_option_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Examples in one optimizer step" in said
    assert "The folder of a trained run" in said


def test_documented_names_exist() -> None:
    """Files, commands and options that the README speaks of."""
    root = Path(__file__).parents[1]
    readme = (root / "README.md").read_text()
    for match in re.findall(r"`([\w/]+\.py)`", readme):
        assert (root / match).is_file() or (root / "fastft" / match).is_file(), match
    for command in re.findall(r"bin/fastft ([a-z]+) +--", readme):
        assert command in COMMANDS, command
    readme = re.sub(r"(deepspeed|torchrun) [^\n]*launch/train\.py", "", readme)  # a launcher's own options
    options = {f.rstrip("_") for command in COMMANDS.values() for f in command.options.__dataclass_fields__}
    options |= {"config", "help"}
    for option in re.findall(r"(?<![\w-])--(\w+)", readme):
        assert option in options, option
