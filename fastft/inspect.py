"""`fastft inspect`: what the trainer will see of a data file, before any compute is spent on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastft.common.console import SafeConsole
from fastft.common.effects import check_effects
from fastft.common.errors import UserError
from fastft.common.keywords import hidden_path, is_keyword
from fastft.common.options import Condition, check_values, names_checked, option
from fastft.data.audit import Findings
from fastft.data.chat_template import template_named
from fastft.data.encode import EncodedSet, EncodingRules, TooLong
from fastft.data.folder_tokenizer import with_special_tokens
from fastft.data.formats import parse_fields
from fastft.data.records import EndOfTextInData, Format, ReadingRules
from fastft.data.sources import Places
from fastft.data.tokenizer import Tokenizer
from fastft.model.gpt2 import SIZES, GPT2Config, config_for
from fastft.model.weights import config_of
from fastft.run.config import DataOptions, LearningOptions
from fastft.run.data import Data, read_sources

_PARTS = ("train", "test", "val")
_STYLES = {"prompt": "dim", "supervised": "bold green", "padding": "red"}


_NO_WEIGHTS = Condition(lambda o, _: o.weights in (None, "none"), "no --weights, which have a size of their own")


@names_checked
@dataclass(frozen=True, kw_only=True)
class InspectOptions(LearningOptions, DataOptions):
    """What is looked at; options that `fastft train` has too mean the same."""

    model: str = option("gpt2-medium", needs=_NO_WEIGHTS)
    """The model whose context limits an example's length."""
    weights: str | None = None
    """Weights as `fastft train` takes them: their tokenizer and their context are the model's."""
    format: Format = "auto"
    """What a row's keys mean; auto: what they tell."""
    fields: str | None = None
    """Other names of keys, THEIRS=OURS: question=instruction,answer=output."""
    max_length: int | None = option(None, at_least=1)
    """The most input tokens of an example; the model's context where it is not given."""
    too_long: TooLong = "truncate"
    """What happens to longer examples: drop or truncate; raise stops, as training would."""
    allow_empty_output: bool = False
    """Take an empty output as a response of nothing; else such a record is malformed."""
    end_of_text_in_data: EndOfTextInData = "refuse"
    """What happens to the text <|endoftext|> in a record: refuse (at the very end of an output it is taken as the end,
    elsewhere the record is malformed) or keep (it is text)."""
    batch_size: int = option(8, at_least=1)
    """Examples in the padded batches that the padding is counted in."""
    example: int | None = None
    """The row to show, of the first file that has it; the first training example where it is not given."""

    def __post_init__(self) -> None:
        check_values(self)
        self.check_learning()
        self.check_data()
        config_for(self.model)  # refuses names that mean nothing
        self.rules()

    def rules(self) -> ReadingRules:
        """What is a record of the data.

        Raises:
            UserError: the fields are not names by names.
        """
        fields = parse_fields(self.fields, self.format)
        return ReadingRules(self.end_of_text_in_data, self.allow_empty_output, format=self.format, fields=fields)

    def config(self) -> GPT2Config:
        """The model's shape and tokenizer.

        Raises:
            UserError: there are no such weights, or their context is shorter than what is asked for.
        """
        if self.weights is None or is_keyword("weights", self.weights):
            own = config_for(self.weights if self.weights in SIZES else self.model)
        else:
            own = config_of(self.weights)
            own.tokenizer.check_fits(own.vocab_size, self.weights)
        if self.max_length is not None and self.max_length > own.n_ctx:
            raise UserError(f"got --max_length {self.max_length}, expected at most the model's context of {own.n_ctx}")
        template = template_named(self.template)
        return replace(own, tokenizer=with_special_tokens(own.tokenizer, template.special_tokens, template.end))


def padded_positions(lengths: Sequence[int], batch_size: int) -> int:
    """Positions that padded batches in file order compute."""
    batches = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    return sum(len(batch) * max(batch) for batch in batches)


def inspect(options: InspectOptions) -> None:
    """Prints token statistics, one example part by part, and what looks wrong with the data.

    Raises:
        UserError: the data cannot be read at all, or the row to show is not there.
    """
    check_effects(options)
    config = options.config()
    out = SafeConsole(highlight=False, soft_wrap=True)
    rules = options.rules().with_end(config.tokenizer.end_mark)
    sources = read_sources(options, rules, token_cache="none", skip_bad_records=True)
    data = Data(sources, template_named(options.template), end_marks=rules.end_marks)
    _print_reading(out, options, data)
    limit, tokenizer = options.max_length or config.n_ctx, config.tokenizer
    encoding = EncodingRules(options.learn(), limit, options.too_long)
    sets = {name: data.encoded(name, encoding, tokenizer) for name in _PARTS}
    out.print(_lengths(sets), _positions(sets, options.batch_size))
    _print_end_of_text(out, sets, tokenizer, data.places)
    for name, encoded in sets.items():
        for line in data.places.lines(encoded.report, limit):
            out.print(f"{name}: {line}", markup=False)
    _print_findings(out, data.audit())
    _print_example(out, sets, options, tokenizer, data.places)


def _print_reading(out: Console, options: InspectOptions, data: Data) -> None:
    """What is to be known of how the files were read: other things of a name, forms, malformed records, parts."""
    hidden = [hidden_path(flag, file) for flag, file in (*options.inputs(), ("weights", options.weights))]
    for line in filter(None, (*hidden, *(source.taken_for for source in data.sources))):
        out.print(line, markup=False, style="yellow")
    for source in data.sources:
        for line in source.describe_pieces():
            out.print(line, markup=False)
        for bad in source.bad:
            out.print(f"{source.name} {bad}", markup=False, style="red")
    if n_bad := sum(len(source.bad) for source in data.sources):
        out.print(f"{n_bad} of {len(data) + n_bad} records are malformed: training stops, unless --skip_bad_records")
    if len(data.sources) > 1:
        for line in data.describe_parts():
            out.print(line, markup=False)


def _lengths(sets: dict[str, EncodedSet]) -> Table:
    table = _table("tokens of an example, its end-of-text included", ("examples", "min", "median", "mean", "max"))
    for name, encoded in sets.items():
        ids = encoded.lengths + 1
        figures = (ids.min(), int(np.median(ids)), f"{ids.mean():.2f}", ids.max()) if len(ids) else ()
        table.add_row(name, str(len(ids)), *map(str, figures))
    return table


def _positions(sets: dict[str, EncodedSet], batch_size: int) -> Table:
    columns = ("inputs", "supervised", "of inputs", f"padded by {batch_size}", "inputs of padded")
    table = _table("positions of a split", columns)
    for name, encoded in sets.items():
        inputs, supervised = int(encoded.lengths.sum()), int(encoded.supervised.sum())
        padded = padded_positions(encoded.lengths.tolist(), batch_size)
        shares = (f"{supervised / max(1, inputs):.1%}", f"{padded:,}", f"{inputs / max(1, padded):.1%}")
        table.add_row(name, f"{inputs:,}", f"{supervised:,}", *shares)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table("split", title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _print_end_of_text(out: Console, sets: dict[str, EncodedSet], tokenizer: Tokenizer, places: Places) -> None:
    """Looks at each example's last id: supervised, as the last one always is, it teaches the model to stop."""
    n, without = 0, []
    for encoded in sets.values():
        ends = encoded.ids[encoded.offsets[1:] - 1]
        n += len(encoded)
        without += encoded.rows[ends != tokenizer.end_of_text].tolist()
    where = f", not in {places.said(without)}" if without else ""
    out.print(f"end-of-text supervised in {n - len(without)} of {n} rows{where}", style="yellow" if without else None)


def _print_findings(out: Console, found: Findings) -> None:
    for line, is_found in found.said():
        out.print(line, markup=False, style="yellow" if is_found else None)


def _print_example(
    out: Console, sets: dict[str, EncodedSet], options: InspectOptions, tokenizer: Tokenizer, places: Places
) -> None:
    encoded, index = _find(sets, options.example, len(places.names))
    ids = encoded[index].tolist()
    begin = index - index % options.batch_size
    longest = int(encoded.lengths[begin : begin + options.batch_size].max())
    padding = [tokenizer.end_of_text] * (longest + 1 - len(ids))
    out.print(f"{places.said([int(encoded.rows[index])])} in its padded batch of {options.batch_size}:", markup=False)
    for name, part in (*_parts(ids, encoded.spans_of(index).tolist()), ("padding", padding)):
        out.print(Text(f"  {name:<10} {len(part):>4} tokens  ").append(_quoted(part, tokenizer), style=_STYLES[name]))


def _parts(ids: list[int], spans: list[list[int]]) -> Iterator[tuple[str, list[int]]]:
    """An example cut where supervised spans begin and end: what each part is, and its ids."""
    at = 0
    for begin, end in spans:
        yield "prompt", ids[at:begin]
        yield "supervised", ids[begin:end]
        at = end


def _quoted(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of ids in quotes, and outside of them the end-of-text tokens behind it, which no text can look like."""
    n_ends = next((n for n, token in enumerate(reversed(ids)) if token != tokenizer.end_of_text), len(ids))
    text = tokenizer.decode(ids[: len(ids) - n_ends])
    parts = [repr(text)] if text else []
    if n_ends:
        parts.append("end-of-text" if n_ends == 1 else f"end-of-text x {n_ends}")
    return " + ".join(parts)


def _find(sets: dict[str, EncodedSet], row: int | None, n_files: int) -> tuple[EncodedSet, int]:
    """The set and the place in it of the example of a row, of the first file that has one; the first example of all
    where no row is given."""
    wanted = [None] if row is None else [Places.of_file(file, [row])[0] for file in range(n_files)]
    for place in wanted:
        for encoded in sets.values():
            at = np.flatnonzero(encoded.rows == place) if place is not None else np.arange(min(1, len(encoded)))
            if len(at):
                return encoded, int(at[0])
    if row is None:
        raise UserError("every example is longer than the limit and dropped; expected a larger --max_length")
    raise UserError(f"got --example {row}, which is not among the usable rows; expected the number of a good record")
