"""The command line: each command is a class of options and the function that takes it.

A command's files are imported when it is called, so that `fastft --help` takes no time.

Exit status (also `fastft.common.errors`): 0 done, 1 failed for a reason of its own, 2 the user's mistake, 3 a judge was
required and none answered; 130 when Ctrl-C stopped it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, FastftError, UserError
from fastft.common.version import __version__

if TYPE_CHECKING:
    import jsonargparse

    from fastft.answers.options import GenerateOptions
    from fastft.demo import DemoOptions
    from fastft.export.export import ExportOptions
    from fastft.reports.report import ReportOptions
    from fastft.run.config import TrainOptions
    from fastft.scores.ab import AbOptions
    from fastft.scores.compare import CompareOptions
    from fastft.scores.score import ScoreOptions
    from fastft.training.train import Outcome
    from fastft.training.verify import VerifyOptions

EXIT_INTERRUPTED = 130
_FIRST_SPEAKS_S = 10.0
"""A launcher ends all ranks when one has failed: the others wait so long for the first, which says what is wrong."""


def _status(outcome: Outcome) -> int:
    return EXIT_INTERRUPTED if outcome.interrupted_by == signal.SIGINT else EXIT_DONE


def _train(options: TrainOptions) -> int:
    from fastft.common.memory import keep_freed_memory
    from fastft.training.train import train

    keep_freed_memory()
    return _status(train(options))


def _demo(options: DemoOptions) -> int:
    from fastft.common.memory import keep_freed_memory
    from fastft.demo import demo

    keep_freed_memory()
    return _status(demo(options))


def _verify_resume(options: VerifyOptions) -> None:
    from fastft.common.memory import keep_freed_memory
    from fastft.training.verify import verify_resume

    keep_freed_memory()
    verify_resume(options)


def _generate(options: GenerateOptions) -> None:
    from fastft.answers.generation import generate

    if options.conversation is not None:
        from fastft.answers.conversations import converse

        _say_result(f"had {len(converse(options))} conversations: {options.path()}")
        return
    if not options.of_a_split:
        _ask(options)
        return
    entries = generate(options)
    _say_result(f"answered {len(entries)} prompts: {options.path()}")


def _ask(options: GenerateOptions) -> None:
    import json

    from fastft.answers.asking import ask, write_answers

    if options.out is not None:
        _say_result(f"answered {write_answers(options.out, ask(options))} questions: {options.out}")
        return
    for entry in ask(options):
        only = options.prompt is not None
        _say_result(entry["model_response"] if only else json.dumps(entry, ensure_ascii=False))


def _score(options: ScoreOptions) -> None:
    from fastft.scores.score import score, summary_line

    print(summary_line(score(options)["summary"]))


def _compare(options: CompareOptions) -> None:
    from fastft.scores.compare import compare, show

    show(compare(options), options.path())


def _report(options: ReportOptions) -> None:
    from fastft.reports.report import report

    _say_result(str(report(options)))


def _export(options: ExportOptions) -> None:
    from fastft.export.export import export

    for line in export(options):
        _say_result(line)


def _ab(options: AbOptions) -> None:
    if not options.import_:
        from fastft.scores.ab import make_page

        _say_result(str(make_page(options)))
        return
    from fastft.scores.ratings import import_ratings, print_summary

    path, result = import_ratings(options)
    print_summary(result)
    _say_result(str(path))


def _say_result(text: str) -> None:
    """Prints for programs as it is, and for a terminal what it does not obey."""
    from fastft.common.console import printable

    print(printable(text) if sys.stdout.isatty() else text)


@dataclass(frozen=True, slots=True)
class Command:
    """One `fastft NAME`.

    Attributes:
        help: what it does.
        options_at: the class of its options, as `MODULE:NAME` within fastft.
        run: takes them; its result is the exit status where it is an int. Also as `MODULE:NAME`.
        begins: what is said at once, as all that it imports takes seconds.
    """

    help: str
    options_at: str
    run: Callable[[Any], object] | str
    begins: str

    @property
    def options(self) -> type[Any]:
        """The class of its options."""
        found: type[Any] = _at(self.options_at)
        return found

    def __call__(self, options: Any) -> object:
        """Does it."""
        run: Callable[[Any], object] = _at(self.run) if isinstance(self.run, str) else self.run
        return run(options)


def _at(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"fastft.{module}"), name)


COMMANDS = {
    "demo": Command(
        "train nano GPT-2 on the embedded data and report, in minutes on a CPU", "demo:DemoOptions", _demo,
        "the demo: loading torch, to train nano GPT-2 on the embedded data",
    ),
    "inspect": Command(
        "show what the trainer will see of a data file", "inspect:InspectOptions", "inspect:inspect",
        "reading the data and encoding it",
    ),
    "train": Command(
        "train a model", "run.config:TrainOptions", _train, "training: loading torch, the data and the model"
    ),
    "generate": Command(
        "answer the test prompts with a run's model", "answers.options:GenerateOptions", _generate,
        "answering: loading torch, the prompts and the model",
    ),
    "chat": Command(
        "ask a run's model in the terminal", "answers.options:ChatOptions", "answers.chat:chat",
        "a chat: loading torch and the model",
    ),
    "score": Command(
        "score a run's responses by a judge and by text metrics", "scores.score:ScoreOptions", _score,
        "scoring: loading the metrics and the responses",
    ),
    "compare": Command(
        "compare two runs' responses, entry by entry, by their scores and by text metrics",
        "scores.compare:CompareOptions",
        _compare,
        "comparing: loading the metrics and both runs",
    ),
    "ab": Command(
        "make a page on which people rate two runs, or sum up their ratings", "scores.ab:AbOptions", _ab,
        "reading the runs or their ratings",
    ),
    "report": Command(
        "make a run's report page", "reports.report:ReportOptions", _report, "making the page: reading the run"
    ),
    "export": Command(
        "write a run's model for transformers, llama.cpp, Ollama or the book's code",
        "export.export:ExportOptions",
        _export,
        "exporting: loading torch and the model",
    ),
    "verify-resume": Command(
        "prove that a stopped and resumed run is the run that was not stopped",
        "training.verify:VerifyOptions",
        _verify_resume,
        "training twice, once with a stop: loading torch, the data and the model",
    ),
    "doctor": Command(
        "examine this machine: versions, kernels against float64, speeds", "doctor.doctor:DoctorOptions",
        "doctor.doctor:doctor",
        "examining this machine: loading torch",
    ),
}  # fmt: skip


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
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _out_of_memory(error)
    except KeyboardInterrupt:
        _say_error("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        _discard_output()
        return EXIT_DONE
    except OSError as error:  # a path that cannot even be looked at, or a full disk behind our output
        if error.filename is None:
            _discard_output()
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
        from fastft.common.nearest import did_you_mean

        raise UserError(
            f"got the command {name!r}, expected one of {', '.join(COMMANDS)}{did_you_mean(name, COMMANDS)}"
        )
    if "--help" in rest or "-h" in rest:
        print(_help(name, rest))
        return EXIT_DONE
    _say_at_once(COMMANDS[name].begins)
    try:
        options = parse(name, rest)
    except UserError as error:
        error.common = True  # all ranks were given the same command line
        if _rank():
            time.sleep(_FIRST_SPEAKS_S)
        raise
    result = COMMANDS[name](options)
    return result if isinstance(result, int) else EXIT_DONE


def _say_at_once(line: str) -> None:
    """Says what is being done, before anything is imported for it."""
    if not _rank():
        from fastft.common.console import say

        say(line)


def _help(name: str, rest: Sequence[str]) -> str:
    """The help of a command, or all about the options that are named behind `--help`."""
    from fastft.common.options import help_of

    command = COMMANDS[name]
    at = min(rest.index(one) for one in ("-h", "--help") if one in rest)
    named = [argument for argument in rest[at + 1 :] if argument not in ("-h", "--help")]
    return help_of(command.options, prog=f"fastft {name}", text=command.help, names=named)


def parse(name: str, arguments: Sequence[str]) -> Any:
    """The options object of a command line.

    Defaults give way to a recipe's, those to the run's own `config.yaml` with `--resume` (so that its options need
    not be said again), those to `--config FILE`'s, those to the options given.

    Raises:
        UserError: an unknown option, a value of the wrong kind, a missing one.
    """
    import jsonargparse

    from fastft.common.options import check_config, options_parser, plain_error, spelt_out

    of, prog = COMMANDS[name].options, f"fastft {name}"
    arguments = spelt_out(of, arguments, prog=prog)
    for path in _values_of("config", arguments):
        check_config(of, _read_config(path), prog=prog, path=path)
    parser = options_parser(of, prog=prog)
    if "resume" in of.__dataclass_fields__:
        arguments = _with_saved_config(parser, of, arguments)
    try:
        values = parser.parse_args(arguments)
    except jsonargparse.ArgumentError as error:
        raise UserError(f"{prog}: {plain_error(error, of)}; see `{prog} --help`") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{prog}: --config: got a file that is not UTF-8 ({error}), expected YAML") from None
    given = values.as_dict()
    return of(**{one.name: given[one.name] for one in fields(of)})


def _with_saved_config(parser: jsonargparse.ArgumentParser, of: type[Any], arguments: list[str]) -> list[str]:
    """Puts the defaults of a recipe and the saved options of a resumed run in front of the options given.

    Raises:
        UserError: the saved ones are not such as this version has.
    """
    from fastft.common.options import check_config
    from fastft.run.config import RECIPES, TrainOptions
    from fastft.run.folder import CONFIG

    config: dict[str, Any] = {}
    for path in _values_of("config", arguments):  # the parser takes several, of which the last one counts
        config |= _read_config(path)

    def given(option: str) -> str | None:
        in_config = None if config.get(option) is None else str(config[option])
        return _value_of(option, arguments) or in_config

    recipe = given("recipe")
    if recipe in RECIPES:
        parser.set_defaults(RECIPES[recipe])
    if not _means_true(given("resume")):
        return arguments
    saved = Path(given("out") or TrainOptions().out) / CONFIG
    if not saved.is_file():
        return arguments
    check_config(of, _read_config(str(saved)), prog=parser.prog, path=str(saved))
    return ["--config", str(saved), *_length_anew(given), *arguments]


def _length_anew(given: Callable[[str], str | None]) -> list[str]:
    """Of `--steps` and `--epochs`, which say the same thing, the one that is given takes the place of the saved one."""
    from fastft.run.config import TrainOptions

    if given("steps") is None and given("epochs") is not None:
        return ["--steps", "null"]
    if given("steps") not in (None, "null") and given("epochs") is None:
        return ["--epochs", str(TrainOptions().epochs)]
    return []


def _means_true(value: str | None) -> bool:
    """Whether the parser takes a value of a flag for true: `True` and `yes` too."""
    return value is not None and value.lower() in ("true", "yes", "on")


def _read_config(path: str) -> dict[str, Any]:
    """The options that a `--config` file gives. What is wrong with the file, the parser will say."""
    import yaml

    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    return {}


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value that the last `--option VALUE` or `--option=VALUE` gives."""
    return next(reversed(_values_of(option, arguments)), None)


def _values_of(option: str, arguments: Sequence[str]) -> list[str]:
    values = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        if name == f"--{option}":
            values.append(value if equals else following)
    return values


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        line
        for name, command in COMMANDS.items()
        for line in textwrap.wrap(
            command.help, 80, initial_indent=f"  {name:<{width}}  ", subsequent_indent=" " * (width + 4)
        )
    ]
    return "\n".join(["usage: fastft COMMAND [options]", "", *lines, "", "`fastft COMMAND --help` lists its options."])


def _is_out_of_memory(error: Exception) -> bool:
    """By name and text: torch is not imported for it, and its allocator on a CPU has no error of its own."""
    names = {one.__name__ for one in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def _out_of_memory(error: Exception) -> int:
    reason = str(error).partition("\n")[0] or "no memory left"
    _say_error(f"out of memory ({reason}); lower --batch_size or raise --accumulate, or use --activation_checkpointing")
    return EXIT_FAILED


def _rank() -> int:
    """Which rank this process is, of those that a launcher has started."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "")
    return int(rank) if rank.isdecimal() else 0


def _discard_output() -> None:
    from fastft.common.console import discard

    discard(sys.stdout)


def _say_error(message: str) -> None:
    from fastft.common.console import console

    if _rank() and not message.startswith("rank "):
        message = f"rank {_rank()}: {message}"
    console.print(f"error: {' '.join(message.split())}", markup=False, style="red")
