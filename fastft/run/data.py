"""The data of a run: its files' records, split, with the template that makes their text."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastft.common.console import warn
from fastft.common.errors import UserError
from fastft.common.keywords import hidden_path
from fastft.data.audit import Findings, audit
from fastft.data.chat_template import AnyTemplate, template_named
from fastft.data.encode import EncodedSet, EncodingRules, encoded_set
from fastft.data.prompts import RESPONSES
from fastft.data.records import ReadingRules, Record
from fastft.data.sources import Places, Source, check_different, first_of_each, joined_parts, read_source
from fastft.data.splits import Shares, split_by
from fastft.data.token_cache import RecordFile, TokenCache, joined
from fastft.data.tokenizer import Tokenizer, gpt2_tokenizer
from fastft.model.gpt2 import GPT2Config
from fastft.run.config import DataOptions, TrainOptions


@dataclass(frozen=True, slots=True)
class Data:
    """The records of a run, split, with the template that makes their text.

    Attributes:
        sources: its files: those of `--data`, each with its own split, and those that are one part alone. A part's
            records are theirs, one file after another.
        template: makes their text.
        mix: how often the examples of each file are drawn; None where each is once an epoch.
        seconds: that reading has taken.
        end_marks: the texts of end-of-texts that were looked for.
    """

    sources: tuple[Source, ...]
    template: AnyTemplate
    mix: tuple[float, ...] | None = None
    seconds: float = 0.0
    end_marks: tuple[str, ...] = ReadingRules().end_marks

    def __len__(self) -> int:
        """Records, of all parts."""
        return sum(len(source.records) for source in self.sources)

    @property
    def source(self) -> str:
        """The files, in one line."""
        return ", ".join(source.name for source in self.sources)

    @property
    def places(self) -> Places:
        """What a row of the encoded sets is called."""
        return Places.of(self.sources)

    @property
    def has_bad(self) -> bool:
        """Whether malformed records were left out."""
        return any(source.bad for source in self.sources)

    def describe_bad(self) -> str:
        """The malformed records in one line."""
        return "; ".join(source.describe_bad() for source in self.sources if source.bad)

    def describe_parts(self) -> Iterator[str]:
        """How many records of each file are in which part, a line for each."""
        for source in self.sources:
            parts = source.parts
            yield f"{source.name}: {len(parts.train)} training, {len(parts.test)} test, {len(parts.val)} validation"

    def as_json(self) -> dict[str, Any]:
        """What the data is, for `data.json`."""
        files = [
            {
                "source": source.name,
                "records": len(source.records),
                **{name: len(getattr(source.parts, name)) for name in ("train", "val", "test")},
                "taken_for": source.taken_for,
            }
            for source in self.sources
        ]
        return {
            "records": len(self),
            "files": files,
            "split_sha256": self.fingerprint(),
            "left_out": [
                {"row": self.places.called(place), "reason": bad.reason}
                for file, source in enumerate(self.sources)
                for bad in source.bad
                for place in self.places.of_file(file, [bad.row])
            ],
        }

    def audit(self) -> Findings:
        """What was read otherwise than it is written, what is not read, and what makes scores lie: in all files, and
        between them."""
        if len(self.sources) == 1:
            (one,) = self.sources
            if isinstance(one.records, RecordFile):
                return one.records.audit(one.parts, self.template)
            return audit(one.records, one.parts, self.template, self.end_marks)
        places = self.places

        def find() -> Findings:
            found = audit(places.records(self.sources), joined_parts(self.sources), self.template, self.end_marks)
            for source in self.sources:
                if isinstance(source.records, RecordFile):
                    source.records.check_unchanged()
            return found

        if self._cache is None:
            return places.findings(find())
        key = {
            "sources": [source.content() for source in self.sources],
            "fingerprint": self.fingerprint(),
            "template": self.template.description(),
            "end_marks": self.end_marks,
        }
        _, facts = self._cache.get("audit", key, lambda _: asdict(find()))
        return places.findings(Findings(**facts))

    def fingerprint(self) -> str:
        """SHA-256 over all records and their split, over the order of the files and their mix: another order would put
        training rows into the test split."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint()
        said = [*(source.fingerprint() for source in self.sources), repr(self.mix)]
        return hashlib.sha256(" ".join(said).encode()).hexdigest()

    def part(self, name: str, most: int | None = None) -> list[Record]:
        """The records of `train`, `test` or `val`, or `most` of them, the first ones of each file."""
        sizes = [len(getattr(source.parts, name)) for source in self.sources]
        counts = sizes if most is None else first_of_each(sizes, most)
        return [record for source, n in zip(self.sources, counts, strict=True) for record in source.part(name, n)]

    def places_of(self, name: str, records: Sequence[Record]) -> list[int]:
        """The places of the records of a whole part."""
        sizes = [len(getattr(source.parts, name)) for source in self.sources]
        files = (file for file, size in enumerate(sizes) for _ in range(size))
        return [place for file, one in zip(files, records, strict=True) for place in Places.of_file(file, [one.row])]

    def encode(self, name: str, options: TrainOptions, config: GPT2Config) -> EncodedSet:
        """A part's examples as token ids of a model; those of large files are memory-mapped. Its rows are places (see
        `Places`)."""
        n_ctx = config.n_ctx
        limit = options.max_length or n_ctx
        if limit > n_ctx:
            raise UserError(f"got --max_length {limit}, expected at most the model's context of {n_ctx}")
        rules = EncodingRules(options.learn(), limit, options.too_long)
        return self.encoded(name, rules, config.tokenizer)

    def longer_than(self, config: GPT2Config, options: TrainOptions) -> list[int]:
        """The test rows that do not fit a model's context with their responses. Training does not read them, but what
        comes after it does: so they are looked at before.

        Raises:
            UserError: there are some, and `--too_long` is `raise`.
        """
        n_ctx = config.n_ctx
        # `--max_length` bounds what is trained on; a test row may be as long as the context.
        rows = self.encoded("test", EncodingRules(RESPONSES, n_ctx, "drop"), config.tokenizer).report.dropped
        if rows and options.too_long == "raise":
            raise UserError(
                f"{len(rows)} test examples are longer than the model's context of {n_ctx} tokens: "
                f"{self.places.said(rows)}; "
                "shorten them, or go on with --too_long drop: what the context has no room for is left out later"
            )
        return rows

    def encoded(self, name: str, rules: EncodingRules, tokenizer: Tokenizer) -> EncodedSet:
        """A part's examples, their rows as places."""
        sets = []
        for file, source in enumerate(self.sources):
            if len(getattr(source.parts, name)):
                with self._naming(source):
                    sets.append(self.places.placed(file, source.encode(name, self.template, tokenizer, rules)))
        return joined(sets, self._cache) if sets else encoded_set([], tokenizer, rules)

    @contextmanager
    def _naming(self, source: Source) -> Iterator[None]:
        """Names the file in what is wrong with its rows, where there are several."""
        try:
            yield
        except UserError as error:
            if len(self.sources) == 1:
                raise
            raise UserError(f"{source.name}: {error}") from error

    @property
    def _cache(self) -> TokenCache | None:
        return next((source.cache for source in self.sources if source.cache), None)


def read_sources(
    options: DataOptions, rules: ReadingRules, *, token_cache: str, skip_bad_records: bool
) -> tuple[Source, ...]:
    """The files that options name, each with its split.

    Raises:
        UserError: a file cannot be read, holds what is malformed, or the same as another.
    """
    inputs, shares = options.inputs(), options.shares()
    sources = []
    for flag, file in inputs:
        try:
            source = read_source(file, rules, token_cache=token_cache, skip_bad_records=skip_bad_records)
        except UserError as error:
            raise error if flag == "data" else UserError(f"--{flag}: {error}") from None
        own = {"val_data": Shares(0.0, 1.0, 0.0), "test_data": Shares(0.0, 0.0, 1.0)}.get(flag)
        n = len(source.records)
        sources.append(replace(source, parts=split_by(own or shares, n, options.split_seed if own is None else None)))
    check_different([flag for flag, _ in inputs], sources)
    return tuple(sources)


def load_data(options: TrainOptions, tokenizer: Tokenizer | None = None, template: AnyTemplate | None = None) -> Data:
    """Reads and splits the data of a run; a large file's records stay in the file (see `fastft.data.token_cache`).

    Args:
        options: of the run.
        tokenizer: the model's, whose end-of-text is looked for in the records; GPT-2's where it is not given.
        template: what the run was trained with; that of the options where it is not given.
    """
    began = time.perf_counter()
    rules = options.reading_rules().with_end((tokenizer or gpt2_tokenizer()).end_mark)
    sources = read_sources(
        options, rules, token_cache=options.token_cache, skip_bad_records=options.skip_bad_records
    )  # fmt: skip
    mix = None if options.mix is None else tuple(options.mix)
    template = template or template_named(options.template)
    return Data(sources, template, mix, time.perf_counter() - began, rules.end_marks)


_OF_TURNS = ("template", "mask_prompt", "train_on", "train_roles")


def _without_effect(options: TrainOptions, data: Data) -> Iterator[str]:
    """What was asked for of conversations, of data that hold none."""
    if any(source.is_written_around for source in data.sources):
        return
    usual = TrainOptions()
    for name in _OF_TURNS:
        if (given := getattr(options, name)) != getattr(usual, name):
            yield (
                f"--{name} {given} has no effect: no template writes around segments, documents and token ids, and "
                "what of them is learned they say themselves"
            )


def warn_of_data(options: TrainOptions, data: Data) -> Findings:
    """Warns of what is to be known of a run's data before it is trained on: one line for each thing; returns them."""
    findings = data.audit()
    hidden = (hidden_path(flag, file) for flag, file in options.inputs())
    for line in filter(None, (*hidden, *(source.taken_for for source in data.sources))):
        warn(line)
    for line in (*_without_effect(options, data), *findings.lines()):
        warn(f"data: {line}")
    return findings
