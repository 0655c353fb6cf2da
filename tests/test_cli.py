"""The command line: where options come from, and what comes first."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
from dataclasses import MISSING, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastft.cli import COMMANDS, main, parse
from fastft.common.errors import UserError
from fastft.common.options import Option, check_config, table
from fastft.common.version import __version__
from fastft.run.config import BOOK_RECIPE, TrainOptions, to_yaml
from fastft.run.folder import Run
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


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert max(map(len, lines)) <= 80
    assert "Optional[" not in said
    assert "Literal[" not in said
    for one in table(COMMANDS[name].options):
        assert one.text, one.name
        shown = one.name.upper() if one.is_place else one.flag
        (line,) = [number for number, line in enumerate(lines) if line.split()[:1] == [shown]]
        assert one.text.partition(". ")[0].rstrip(".")[:20] in " ".join(" ".join(lines[line : line + 4]).split())
        assert one.group in lines[:line]


def test_all_about_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help", "batch-size", "--warmup"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--batch_size Examples in one optimizer step." in said
    assert "Expected: a whole number (8)." in said
    assert "At least 1." in said
    assert "It needs more steps than it has" in said
    assert main(["train", "--help", "wamrup"]) == 2
    assert "did you mean --warmup?" in " ".join(capsys.readouterr().err.split())


def test_both_spellings_of_an_option(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("lr: 0.5\n")
    given = parse("train", ["--batch-size", "2", "--keep-best=false", "--tie_head", "false", "--config", str(config)])
    assert (given.batch_size, given.keep_best, given.tie_head, given.lr) == (2, False, False, 0.5)


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("joined", [True, False], ids=["--config=FILE", "--config FILE"])
def test_the_command_line_counts_more_than_a_file_wherever_it_stands(place: int, joined: bool, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"out: {tmp_path / 'of-the-file'}\nlr: 0.5\nseed: 5\n")
    arguments = ["--out", str(tmp_path / "given"), "--seed", "7"]
    arguments[place:place] = [f"--config={config}"] if joined else ["--config", str(config)]
    given = parse("train", arguments)
    assert (given.out, given.seed, given.lr) == (tmp_path / "given", 7, 0.5)


OPTION_CLASSES = {name: command.options for name, command in COMMANDS.items()}
ROWS = [(name, one) for name, of in OPTION_CLASSES.items() for one in table(of)]


@pytest.mark.parametrize(("name", "one"), ROWS, ids=[f"{name} {one.name}" for name, one in ROWS])
def test_null_in_a_file_is_taken_where_the_table_says_so(name: str, one: Option, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"{one.name}:  # nothing behind it\n")
    if "null" in one.type_in_words:
        check_config(OPTION_CLASSES[name], {one.name: None}, prog="fastft", path="c.yaml")
        return
    with pytest.raises(UserError, match=rf"--config {config}: got {one.flag} null, expected "):
        parse(name, ["--config", str(config)])


@pytest.mark.parametrize("field", ["batch_size", "lr", "mask_prompt", "schedule", "out"])
def test_none_is_refused_from_python_too(field: str) -> None:
    with pytest.raises(UserError, match=f"got --{field} null, expected"):
        TrainOptions(**{field: None})


@pytest.mark.parametrize(
    ("field", "given"),
    [("lr", "fast"), ("batch_size", "1.5"), ("schedule", "step"), ("mask_prompt", "perhaps"), ("steps", "ten"),
     ("batch_size", "0"), ("track", "wandbb"), ("lora_r", "four")],
)  # fmt: skip
def test_python_and_the_command_line_refuse_with_the_same_words(field: str, given: str) -> None:
    with pytest.raises(UserError) as on_the_command_line:
        parse("train", [f"--{field}", given])
    value = int(given) if given.isdecimal() else given
    with pytest.raises(UserError) as in_python:
        TrainOptions(**{field: value})
    said = str(on_the_command_line.value).removeprefix("fastft train: ").partition("; see `")[0]
    assert str(in_python.value).replace(f"{given!r}, expected", f"{given}, expected") == said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lr": "a"}, "got --lr 'a', expected a number"),
        ({"batch_size": 8.0}, "got --batch_size 8.0, expected a whole number"),
        ({"batch_size": True}, "got --batch_size True, expected a whole number"),
        ({"mask_prompt": 1}, "got --mask_prompt 1, expected true or false"),
        ({"weights": 3}, "got --weights 3, expected text or null"),
        ({"batchsize": 8}, "got batchsize, which is no option of TrainOptions (did you mean batch_size?)"),
    ],
)
def test_what_python_alone_can_get_wrong(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        TrainOptions(**given)  # type: ignore[arg-type] # the mistake
    with pytest.raises(UserError, match=re.escape(said)):
        replace(TrainOptions(), **given)  # type: ignore[arg-type] # the mistake


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_no_class_of_options_takes_a_name_of_none(name: str) -> None:
    options = COMMANDS[name].options
    with pytest.raises(UserError, match=f"got weightz, which is no option of {options.__name__}"):
        options(**{one.name: Path("run") for one in table(options) if one.default is MISSING}, weightz=1)


@pytest.mark.parametrize(("value", "remedy"), [("true", "put `track: tensorboard` there"), ("false", "take its line")])
def test_an_option_of_an_earlier_version_in_a_runs_file(tmp_path: Path, value: str, remedy: str) -> None:
    """What reads the run says what to do, and in which file."""
    (tmp_path / "config.yaml").write_text(f"data: sample\nout: {tmp_path}\ntensorboard: {value}\n")
    for ask in (
        lambda: parse("train", ["--resume", "--out", str(tmp_path)]),
        lambda: parse("train", ["--config", str(tmp_path / "config.yaml")]),
        lambda: Run(tmp_path).options(),
    ):
        with pytest.raises(UserError, match=f"{tmp_path}/config.yaml: got tensorboard, .*{remedy}"):
            ask()


@pytest.mark.parametrize(
    "given",
    [{"lora_r": 2, "lora_targets": "c_attn,"}, {"train_only": "wte,"}, {"track": "tensorboard,"}, {"train_roles": ","}],
)
def test_a_comma_without_a_name(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="with a comma and no name beside it; expected such as "):
        TrainOptions(**given)


def test_numbers_of_another_kind_are_taken_as_their_own() -> None:
    options = TrainOptions(lr=1, batch_size=np.int64(4), weight_decay=np.float32(0.5))
    assert [(type(x), x) for x in (options.lr, options.batch_size, options.weight_decay)] == [
        (float, 1.0), (int, 4), (float, 0.5),
    ]  # fmt: skip
    assert copy.deepcopy(options) == options == pickle.loads(pickle.dumps(options))


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        ("train", "batch-size: 4", "got batch-size, which is no option of it (did you mean batch_size?)"),
        ("train", "batch_sise: 4", "got batch_sise, which is no option of it (did you mean batch_size?)"),
        ("report", "against: rs", "got --against rs, expected a list: [rs]"),
        ("train", "out: 5", "got --out 5, expected a path"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_plain_words(command: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        parse(command, ["--config", str(tmp_path / "c.yaml")])


def test_help_of_an_option_wherever_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--lr", "3", "--help", "steps"]) == 0
    assert "A resumed run may change it where --schedule is constant." in " ".join(capsys.readouterr().out.split())
    assert main(["train", "--lr", "3", "--help", "stpes"]) == 2
    assert "did you mean --steps?" in " ".join(capsys.readouterr().err.split())


def test_the_list_of_commands_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_flag_does_not_take_a_files_name() -> None:
    assert parse("train", ["--dry-run", "--data", "my-file.json"]).data == "my-file.json"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "did you mean train?"),
        (["train", "--batchsize", "3"], "--batchsize, which is no option of it (did you mean --batch_size?)"),
        (["train", "--epoch=3"], "--epoch, which is no option of it (did you mean --epochs?)"),
        (["train", "--zzz"], "--zzz, which is no option of it; see"),
    ],
)
def test_the_nearest_name_is_named(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert expected in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--data", "{}/recrods.json"],
        ["train", "--config", "{}/recrods.json"],
        ["inspect", "--data", "{}/recrods.json"],
        ["train", "--data", "sample", "--weights", "{}/recrods.json", "--out", "{}/out"],
        ["generate", "--run", "{}/recrods.json"],
        ["score", "--run", "{}/recrods.json"],
        ["report", "--run", "{}/recrods.json"],
        ["compare", "{}/recrods.json", "{}/recrods.json"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_the_nearest_file_is_named(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "records.json").touch()
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    said = capsys.readouterr().err.replace("\n", "")
    assert f"(did you mean {tmp_path / 'records.json'}?)" in said


HEAVY = ("torch", "transformers", "scipy", "nltk", "rouge_score", "sacrebleu", "matplotlib", "deepspeed")


@pytest.mark.parametrize(
    ("arguments", "without"),
    [
        (["--help"], (*HEAVY, "numpy", "jsonargparse", "rich", "yaml")),
        (["--version"], (*HEAVY, "numpy", "jsonargparse", "rich", "yaml")),
        (["train", "--help"], HEAVY),
        (["generate", "--help"], HEAVY),
        (["chat", "--help"], HEAVY),
        (["score", "--help"], HEAVY),
        (["report", "--help"], ("torch", "nltk", "rouge_score")),
    ],
)
def test_what_is_not_needed_is_not_imported(arguments: list[str], without: tuple[str, ...]) -> None:
    code = (
        f"import sys; from fastft.cli import main; assert main({arguments}) == 0; print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert not {name.partition(".")[0] for name in done.stderr.splitlines()[-1].split()} & {*without}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_done_is_said_before_anything_heavy_is_loaded(name: str) -> None:
    code = (
        "import sys; from fastft.cli import main; from fastft.common import console\n"
        f"def say(line): print(line, {set(HEAVY)} & sys.modules.keys(), file=sys.stderr); raise SystemExit\n"
        f"console.say = say; main([{name!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == f"{COMMANDS[name].begins} set()\n"


def test_a_score_without_a_judge_and_a_model_needs_no_torch(tmp_path: Path) -> None:
    entry = {"instruction": "Say A.", "input": "", "output": "A", "model_response": "B"}
    (tmp_path / "responses.json").write_text(json.dumps([entry]))
    arguments = ["score", "--run", str(tmp_path), "--judge", "none"]
    code = f"import sys; from fastft.cli import main; assert main({arguments}) == 0; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert (tmp_path / "scores.json").is_file()


def test_public_names_are_there() -> None:
    import fastft

    assert {name for name in fastft.__all__ if getattr(fastft, name) is None} == set()
    assert {*fastft.__all__} <= {*dir(fastft)}
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = fastft.trian


def test_of_several_config_files_each_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("recipe: book\nlr: 0.5\n")
    second.write_text("model: pico\nlr: 0.25\n")
    options = parse("train", ["--config", str(first), "--config", str(second)])
    assert (options.tie_head, options.drop_last, options.model, options.lr) == (False, True, "pico", 0.25)


def test_paths_may_be_given_as_text_in_python(tmp_path: Path) -> None:
    from fastft import CompareOptions, ReportOptions, ScoreOptions, UserError

    assert ScoreOptions(run="a", judge="none").run == Path("a")  # type: ignore[arg-type] # as people write it
    assert CompareOptions("a", "b").path() == Path("a/compare-b.json")  # type: ignore[arg-type] # as above
    assert ReportOptions(run="a", against=["b"]).against == [Path("b")]  # type: ignore[arg-type, list-item] # as above
    for wrong in ({"run": 3}, {"run": "a", "against": [3]}):
        with pytest.raises(UserError, match=r"expected (a path|paths)"):
            ReportOptions(**wrong)  # type: ignore[arg-type] # the mistake
