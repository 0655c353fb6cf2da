"""`fastft ab`: a page on which people rate the answers of two runs side by side, not knowing which is whose.

The page calls the two answers to a question A and B. Which run is behind which letter changes from question to
question, drawn from a seed. The page holds the seed but not the draw; its ratings speak of A and B, and
`fastft.scores.ratings` draws again to know the runs. A page is named by the SHA-256 of what it shows, so that ratings
are never read as those of other answers.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastft.common.console import warn
from fastft.common.effects import check_effects
from fastft.common.errors import UserError
from fastft.common.lock import writing
from fastft.common.nearest import did_you_mean_path
from fastft.common.options import Condition, check_values, names_checked, option
from fastft.data.records import left_out
from fastft.pages.render import write_page
from fastft.run.decodings import Names, names_of_two, page_called
from fastft.run.folder import AB_PAGE, RESPONSES
from fastft.scores.compare import matched
from fastft.scores.score import read_responses

RATINGS_FORMAT = "fastft ratings 1"
CHOICES = ("a", "b", "tie", "both_bad")
SCALE = (1, 2, 3, 4, 5)


_A_PAGE = Condition(lambda o, _: not o.import_, "a page to make: ratings that are imported say it themselves")


@names_checked
@dataclass(frozen=True)
class AbOptions:
    """The runs, and how they are shown."""

    run_a: Path | None = None
    """One run; the page, and later ab.json, are written into its folder."""
    run_b: Path | None = None
    """The other run, which has answered the same questions."""
    _: KW_ONLY
    name: str | list[str] | None = option(None, needs=_A_PAGE)
    """What the responses are called, where they have a name, in both runs; or two names, of the first run's and of the
    second's, by which two decodings of one run are rated. In place of a name, test means the responses without one.
    The page is then ab.NAME.html."""
    import_: list[Path] = option([])
    """Files that the page has exported, one of each rater: sums them up instead of making a page."""
    seed: int = option(123, needs=_A_PAGE)
    """Draws the order of the questions, and which run is A at each."""
    limit: int | None = option(None, at_least=1, needs=_A_PAGE)
    """Asks for so many of the questions, drawn by the seed, instead of all."""
    reference: bool = option(True, needs=_A_PAGE)
    """Lets raters look at the reference, behind a key."""
    scale: bool = option(False, needs=_A_PAGE)
    """Also asks how good each answer is, from 1 to 5. Without it and --reason, one key or tap answers a question."""
    reason: bool = option(False, needs=_A_PAGE)
    """Also asks why, in the rater's own words, which may be none."""

    def __post_init__(self) -> None:
        check_values(self)
        self.names()
        if (self.run_a is None) != (self.run_b is None):
            raise UserError(f"got one run, {self.run_a or self.run_b}, expected two: fastft ab RUN_A RUN_B")
        if self.run_a is None and not self.import_:
            raise UserError("got no run, expected two: fastft ab RUN_A RUN_B, or fastft ab --import RATINGS.json ...")

    def names(self) -> Names:
        """What the responses of the first run and of the second are called; None of those without a name.

        Raises:
            UserError: there are more than two, or one is no name.
        """
        return names_of_two(self.name)


@dataclass(frozen=True, slots=True)
class Item:
    """One question with its two answers as the page shows them."""

    item: int
    """Row of the question in the first run's responses.json, from 1."""
    instruction: str
    input: str
    reference: str
    a: str
    b: str


@dataclass(frozen=True)
class Sheet:
    """What a page shows, and what it does not: which run is behind which letter."""

    runs: tuple[Path, Path]
    names: Names
    """What the responses are called."""
    seed: int
    limit: int | None
    items: tuple[Item, ...]
    first_is_a: tuple[bool, ...]
    """For each item, whether A is the first run's answer."""
    order: tuple[int, ...]
    """For each response of the first run, where in the second run's the one to the same question is."""
    n_same: int
    """Questions that both runs have answered, and with the same text, which there is no use in asking about."""

    @cached_property
    def page(self) -> str:
        """The SHA-256 of what is shown, by which a page and its ratings know each other."""
        shown = json.dumps([asdict(item) for item in self.items], sort_keys=True)
        return hashlib.sha256(shown.encode()).hexdigest()


def make_page(options: AbOptions) -> Path:
    """Writes RUN_A/ab.html, of named responses RUN_A/ab.NAME.html, and returns its path.

    Raises:
        UserError: a run has no responses, they answer other questions, all answers are the same, or another process
            writes to RUN_A.
    """
    assert options.run_a is not None
    assert options.run_b is not None
    check_effects(options)
    sheet = make_sheet((options.run_a, options.run_b), options.seed, options.limit, options.names())
    path = options.run_a / page_called(AB_PAGE, options.names())
    shown = _page_data(sheet, options)
    with writing(options.run_a):
        write_page(path, "ab.html.j2", styles=("base.css", "ab.css"), scripts=("ab.js",), data=shown)
    return path


def make_sheet(runs: tuple[Path, Path], seed: int, limit: int | None, names: Names = (None, None)) -> Sheet:
    """Draws what a page of two runs asks, and in which order. The same arguments give the same sheet."""
    if runs[0].resolve() == runs[1].resolve() and names[0] == names[1]:
        raise UserError(f"got {runs[0]} twice, expected two runs, or two --name of one run's responses")
    first, second = map(_responses_of, runs, names)
    order = matched(first, second, *runs)
    pairs = [(entry, second[place]) for entry, place in zip(first, order, strict=True)]
    answered = [row for row, pair in enumerate(pairs) if not any(map(left_out, pair))]
    if n_left := len(pairs) - len(answered):
        warn(f"{n_left} of {len(pairs)} questions are not asked about: fastft generate left them out of a run")
    differing = [row for row in answered if _answer(pairs[row][0]) != _answer(pairs[row][1])]
    if not differing:
        raise UserError(f"nothing to compare: {runs[0]} and {runs[1]} give the same {len(answered)} answers")
    draw = random.Random(seed)
    rows = draw.sample(differing, min(limit or len(differing), len(differing)))
    # As often A as B, up to one: a rater's liking for a letter then favours neither run.
    first_is_a = [place % 2 == 0 for place in range(len(rows))]
    draw.shuffle(first_is_a)
    items = [_item(row, *pairs[row], swapped=not is_a) for row, is_a in zip(rows, first_is_a, strict=True)]
    return Sheet(
        runs, names, seed, limit, tuple(items), tuple(first_is_a), tuple(order), len(answered) - len(differing)
    )


def _responses_of(run: Path, name: str | None) -> list[dict[str, Any]]:
    if not run.is_dir():
        near = did_you_mean_path(run)
        raise UserError(f"no such run: {run} is not a folder{near}; fastft ab takes two runs that have {RESPONSES}")
    return read_responses(run, name)


def _answer(entry: Mapping[str, Any]) -> str:
    return str(entry["model_response"]).strip()


def _item(row: int, first: Mapping[str, Any], second: Mapping[str, Any], *, swapped: bool) -> Item:
    a, b = (second, first) if swapped else (first, second)
    return Item(row + 1, first["instruction"], first["input"], first["output"], _answer(a), _answer(b))


def _page_data(sheet: Sheet, options: AbOptions) -> dict[str, Any]:
    items: Sequence[dict[str, Any]] = [asdict(item) for item in sheet.items]
    if not options.reference:
        items = [{**item, "reference": None} for item in items]
    return {
        "format": RATINGS_FORMAT,
        "page": sheet.page,
        "runs": [str(run) for run in sheet.runs],
        "names": list(sheet.names),
        "seed": sheet.seed,
        "limit": sheet.limit,
        "scale": options.scale,
        "reason": options.reason,
        "items": items,
    }
