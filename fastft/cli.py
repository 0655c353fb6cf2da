"""The command line: each command is a dataclass of options and the function that takes it.

Exit status (also `fastft.common.errors`): 0 done, 1 failed for a reason of its own, 2 the user's mistake, 3 a judge was
required and none answered; 130 when Ctrl-C stopped it.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import yaml

from fastft.answers.chat import ChatOptions, chat
from fastft.answers.generation import GenerateOptions, generate
from fastft.common.console import console, discard
from fastft.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, FastftError, UserError
from fastft.common.memory import keep_freed_memory
from fastft.common.options import options_parser, plain_error, positionals
from fastft.common.version import __version__
from fastft.demo import DemoOptions, demo
from fastft.doctor.doctor import DoctorOptions, doctor
from fastft.inspect import InspectOptions, inspect
from fastft.reports.report import ReportOptions, report
from fastft.run.config import RECIPES, TrainOptions
from fastft.run.folder import Run
from fastft.scores.ab import AbOptions, make_page
from fastft.scores.compare import CompareOptions, compare, show
from fastft.scores.ratings import import_ratings, print_summary
from fastft.scores.score import ScoreOptions, score, summary_line
from fastft.training.train import Outcome, train
from fastft.training.verify import VerifyOptions, verify_resume

EXIT_INTERRUPTED = 130
_FIRST_SPEAKS_S = 10.0
"""A launcher ends all ranks when one has failed: the others wait so long for the first, which says what is wrong."""


def _status(outcome: Outcome) -> int:
    return EXIT_INTERRUPTED if outcome.interrupted_by == signal.SIGINT else EXIT_DONE


def _train(options: TrainOptions) -> int:
    keep_freed_memory()
    return _status(train(options))


def _demo(options: DemoOptions) -> int:
    keep_freed_memory()
    return _status(demo(options))


def _verify_resume(options: VerifyOptions) -> None:
    keep_freed_memory()
    verify_resume(options)


def _generate(options: GenerateOptions) -> None:
    entries = generate(options)
    print(f"answered {len(entries)} prompts: {Run(options.run).responses_of(options.split)}")


def _score(options: ScoreOptions) -> None:
    print(summary_line(score(options)["summary"]))


def _compare(options: CompareOptions) -> None:
    show(compare(options), options.path())


def _report(options: ReportOptions) -> None:
    print(report(options))


def _ab(options: AbOptions) -> None:
    if not options.import_:
        print(make_page(options))
        return
    path, result = import_ratings(options)
    print_summary(result)
    print(path)


@dataclass(frozen=True, slots=True)
class Command:
    """One `fastft NAME`."""

    help: str
    options: type[Any]
    run: Callable[[Any], object]
    """Its result is the exit status where it is an int."""


COMMANDS = {
    "demo": Command("train nano GPT-2 on the embedded data and report, in minutes on a CPU", DemoOptions, _demo),
    "inspect": Command("show what the trainer will see of a data file", InspectOptions, inspect),
    "train": Command("train a model", TrainOptions, _train),
    "generate": Command("answer the test prompts with a run's model", GenerateOptions, _generate),
    "chat": Command("ask a run's model in the terminal", ChatOptions, chat),
    "score": Command("score a run's responses by a judge and by text metrics", ScoreOptions, _score),
    "compare": Command(
        "compare two runs' responses, entry by entry, by their scores and by text metrics", CompareOptions, _compare
    ),
    "ab": Command("make a page on which people rate two runs, or sum up their ratings", AbOptions, _ab),
    "report": Command("make a run's report page", ReportOptions, _report),
    "verify-resume": Command(
        "prove that a stopped and resumed run is the run that was not stopped", VerifyOptions, _verify_resume
    ),
    "doctor": Command("examine this machine: versions, kernels against float64, speeds", DoctorOptions, doctor),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # data may hold text that the terminal's encoding has no letters for
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _main(arguments)
        sys.stdout.flush()
        return status
    except FastftError as error:
        if not (error.common and _rank()):  # the first rank says it for all
            _say_error(str(error))
        return error.exit_status
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _out_of_memory(error)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # the only mark of torch's allocator on a CPU
            raise
        return _out_of_memory(error)
    except KeyboardInterrupt:
        _say_error("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        discard(sys.stdout)
        return EXIT_DONE
    except OSError as error:  # a path that cannot even be looked at, or a full disk behind our output
        if error.filename is None:
            discard(sys.stdout)
        where = f"cannot use {error.filename}" if error.filename else "cannot read or write"
        _say_error(f"{where}: {error.strerror or error}; check the path, its permissions and the free space")
        return EXIT_USER_ERROR


def _main(arguments: list[str]) -> int:
    if arguments in (["--version"], ["-V"]):
        print(f"fastft {__version__}")
        return EXIT_DONE
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return EXIT_DONE if arguments else EXIT_USER_ERROR
    name, *rest = arguments
    if name not in COMMANDS:
        raise UserError(f"got the command {name!r}, expected one of {', '.join(COMMANDS)}")
    try:
        options = parse(name, rest)
    except UserError as error:
        error.common = True  # all ranks were given the same command line
        if _rank():
            time.sleep(_FIRST_SPEAKS_S)
        raise
    result = COMMANDS[name].run(options)
    return result if isinstance(result, int) else EXIT_DONE


def parse(name: str, arguments: Sequence[str]) -> Any:
    """The options object of a command line.

    Defaults give way to a recipe's, those to the run's own `config.yaml` with `--resume` (so that its options need
    not be said again), those to `--config FILE`'s, those to the options given.

    Raises:
        UserError: an unknown option, a value of the wrong kind, a missing one.
    """
    command = COMMANDS[name]
    arguments = _spell_out_flags(command.options, arguments)
    parser = options_parser(command.options, prog=f"fastft {name}", description=command.help)
    if issubclass(command.options, TrainOptions):
        arguments = _with_saved_config(parser, arguments)
    try:
        values = parser.parse_args(arguments)
    except jsonargparse.ArgumentError as error:
        problem = plain_error(error, command.options)
        raise UserError(f"fastft {name}: {problem}; see `fastft {name} --help`") from None
    except UnicodeDecodeError as error:
        raise UserError(f"fastft {name}: --config: got a file that is not UTF-8 ({error}), expected YAML") from None
    given = values.as_dict()
    return command.options(**{f.name: given[f.name] for f in fields(command.options)})


def _with_saved_config(parser: jsonargparse.ArgumentParser, arguments: list[str]) -> list[str]:
    """Puts the defaults of a recipe and the saved options of a resumed run in front of the options given."""
    config = _read_config(_value_of("config", arguments))

    def given(option: str) -> str | None:
        in_config = None if config.get(option) is None else str(config[option])
        return _value_of(option, arguments) or in_config

    recipe = given("recipe")
    if recipe in RECIPES:
        parser.set_defaults(RECIPES[recipe])
    if not _means_true(given("resume")):
        return arguments
    saved = Path(given("out") or TrainOptions().out) / "config.yaml"
    return ["--config", str(saved), *_length_anew(given), *arguments] if saved.is_file() else arguments


def _length_anew(given: Callable[[str], str | None]) -> list[str]:
    """Of `--steps` and `--epochs`, which say the same thing, the one that is given takes the place of the saved one."""
    if given("steps") is None and given("epochs") is not None:
        return ["--steps", "null"]
    if given("steps") not in (None, "null") and given("epochs") is None:
        return ["--epochs", str(TrainOptions().epochs)]
    return []


def _means_true(value: str | None) -> bool:
    """Whether the parser takes a value of a flag for true: `True` and `yes` too."""
    return value is not None and value.lower() in ("true", "yes", "on")


def _read_config(path: str | None) -> dict[str, Any]:
    """The options that a `--config` file gives. What is wrong with the file, the parser will say."""
    if path is None:
        return {}
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    return {}


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value that the last `--option VALUE` or `--option=VALUE` gives."""
    value = None
    for position, argument in enumerate(arguments):
        if argument == f"--{option}":
            value = arguments[position + 1] if position + 1 < len(arguments) else None
        elif argument.startswith(f"--{option}="):
            value = argument.partition("=")[2]
    return value


def _spell_out_flags(options: type[Any], arguments: Sequence[str]) -> list[str]:
    """`--resume` alone means `--resume true`."""
    flags = {f"--{name}" for name, kind in typing.get_type_hints(options).items() if kind is bool}
    spelt: list[str] = []
    for position, argument in enumerate(arguments):
        spelt.append(argument)
        following = arguments[position + 1] if position + 1 < len(arguments) else "--"
        # Where something can come without an option's name, only what is a value is taken for the flag's.
        is_value = following in ("true", "false") if positionals(options) else not following.startswith("-")
        if argument in flags and not is_value:
            spelt.append("true")
    return spelt


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: fastft COMMAND [options]", "", *lines, "", "`fastft COMMAND --help` lists its options."])


def _out_of_memory(error: Exception) -> int:
    reason = str(error).partition("\n")[0] or "no memory left"
    _say_error(f"out of memory ({reason}); lower --batch_size or raise --accumulate, or use --activation_checkpointing")
    return EXIT_FAILED


def _rank() -> int:
    """Which rank this process is, of those that a launcher has started."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "")
    return int(rank) if rank.isdecimal() else 0


def _say_error(message: str) -> None:
    if _rank() and not message.startswith("rank "):
        message = f"rank {_rank()}: {message}"
    console.print(f"error: {' '.join(message.split())}", markup=False, style="red")
