from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_records import made_records

from fastft.common.errors import UserError
from fastft.data.encode import EncodedSet, encode, name_rows, prompts_of
from fastft.data.prompts import ALL, ALPACA, LAST, PHI3, RESPONSES, Learn, Template
from fastft.data.reading import load_records
from fastft.data.records import Record, Turn
from fastft.data.tokenizer import END_OF_TEXT, gpt2_tokenizer

TOKENIZER = gpt2_tokenizer()
BOOKS = (ALPACA, PHI3)
RECORDS = [Record(**record, row=row) for row, record in enumerate(made_records(6), start=1)]
TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


def encoded(
    records: list[Record],
    *,
    template: Template = ALPACA,
    learn: Learn = RESPONSES,
    max_length: int = 1024,
    **options: Any,
) -> EncodedSet:
    return encode(records, template, TOKENIZER, learn=learn, max_length=max_length, **options)


def book_targets(record: Record, template: Template, *, mask: bool) -> list[int]:
    """The targets that the book's dataset and collate make of a record, -100 where nothing is asked."""
    prompt = template.prompt(record.instruction, record.input)
    ids = [*TOKENIZER.encode(prompt + template.response(record.output)), END_OF_TEXT]
    targets = ids[1:]
    if mask:
        n_prompt = len(TOKENIZER.encode(prompt))
        targets[: n_prompt - 1] = [-100] * (n_prompt - 1)
    return targets


def targets_of(some: EncodedSet, index: int) -> list[int]:
    ids, first = some[index].tolist(), int(some.first_target[index])
    return [-100] * (first - 1) + ids[first:]


@pytest.mark.parametrize("mask", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("template", BOOKS, ids=lambda template: template.name)
def test_targets_are_the_books(template: Template, mask: bool) -> None:
    some = encoded(RECORDS, template=template, learn=RESPONSES if mask else ALL)
    assert some.report.encoded_apart == []
    for index, record in enumerate(RECORDS):
        assert targets_of(some, index) == book_targets(record, template, mask=mask)
    assert some.supervised.tolist() == [
        sum(target != -100 for target in book_targets(record, template, mask=mask)) for record in RECORDS
    ]


def test_the_header_the_output_and_the_end_are_what_a_mask_leaves() -> None:
    some = encoded(RECORDS)
    for index, record in enumerate(RECORDS):
        supervised = some[index][some.first_target[index] :].tolist()
        assert supervised == [*TOKENIZER.encode(ALPACA.response(record.output)), END_OF_TEXT]


def test_the_arrays_fit_each_other() -> None:
    some = encoded(RECORDS)
    assert (some.ids.dtype, some.offsets.dtype, some.first_target.dtype) == (np.int32, np.int64, np.int64)
    assert len(some) == 6
    assert some.offsets[0] == 0
    assert some.offsets[-1] == len(some.ids)
    assert some.rows.tolist() == [1, 2, 3, 4, 5, 6]
    assert some.lengths.tolist() == [len(some[i]) - 1 for i in range(6)]


def test_an_input_that_ends_in_a_newline_is_encoded_apart_and_named() -> None:
    """GPT-2 would join its newline with the header's into a token across the boundary."""
    record = Record(instruction="Spell it.", input="cat\n", output="C-A-T", row=7)
    prompt, response = ALPACA.prompt("Spell it.", "cat\n"), ALPACA.response("C-A-T")
    prompt_ids = TOKENIZER.encode(prompt)
    assert TOKENIZER.encode(prompt + response)[: len(prompt_ids)] != prompt_ids
    for mask in (True, False):
        some = encoded([RECORDS[0], record], learn=RESPONSES if mask else ALL)
        assert some[1].tolist() == [*prompt_ids, *TOKENIZER.encode(response), END_OF_TEXT]
        assert some.first_target[1] == (len(prompt_ids) if mask else 1)
        assert some.report.encoded_apart == [7]
        (line,) = some.report.lines(1024)
        assert line.startswith("1 examples prompt and response encoded apart")
        assert line.endswith("row 7")


@given(instruction=TEXT.filter(str.strip), input=TEXT, output=TEXT, template=st.sampled_from([ALPACA, PHI3]))
@settings(max_examples=80)
def test_an_example_begins_with_its_prompt_and_ends_with_one_end(
    instruction: str, input: str, output: str, template: Template
) -> None:
    """What generation is asked with is what training saw, whatever the text."""
    some = encoded([Record(instruction=instruction, input=input, output=output)], template=template)
    prompt_ids = TOKENIZER.encode(template.prompt(instruction, input))
    ids = some[0].tolist()
    assert ids[: len(prompt_ids)] == prompt_ids
    assert some.first_target[0] == len(prompt_ids)
    assert ids.index(END_OF_TEXT) == len(ids) - 1
    assert TOKENIZER.decode(ids[len(prompt_ids) : -1]) == template.response(output)


def test_over_long_examples_are_refused_dropped_or_cut() -> None:
    long = replace(RECORDS[2], output="word " * 50)
    records = [*RECORDS[:2], long, *RECORDS[3:]]
    limit = int(encoded(RECORDS).lengths.max())

    with pytest.raises(UserError, match=rf"1 examples are longer than {limit} tokens: row 3; .*--too_long drop"):
        encoded(records, max_length=limit)

    dropped = encoded(records, max_length=limit, too_long="drop")
    assert dropped.rows.tolist() == [1, 2, 4, 5, 6]
    assert dropped.report.dropped == [3]
    assert dropped.report.lines(limit) == [f"1 examples longer than {limit} tokens and dropped: row 3"]

    cut = encoded(records, max_length=limit, too_long="truncate")
    assert cut.lengths[2] == limit
    assert cut[2].tolist() == encoded(records)[2][: limit + 1].tolist()
    assert END_OF_TEXT not in cut[2]
    assert cut.report.truncated == [3]
    assert "end-of-text is not learned" in cut.report.lines(limit)[0]


def test_the_limit_counts_inputs() -> None:
    """An example of n ids has n - 1 inputs: one that just fits keeps its end-of-text."""
    (length,) = encoded(RECORDS[:1]).lengths
    fits = encoded(RECORDS[:1], max_length=int(length))
    assert fits[0][-1] == END_OF_TEXT
    with pytest.raises(UserError):
        encoded(RECORDS[:1], max_length=int(length) - 1)


def test_a_prompt_that_fills_the_limit_is_refused_where_cutting_leaves_no_target() -> None:
    n_prompt = len(TOKENIZER.encode(ALPACA.prompt(RECORDS[0].instruction)))
    one_left = encoded(RECORDS[:1], max_length=n_prompt, too_long="truncate")
    assert one_left.supervised.tolist() == [1]
    with pytest.raises(UserError, match=r"no supervised token.*row 1; "):
        encoded(RECORDS[:1], max_length=n_prompt - 1, too_long="truncate")
    assert encoded(RECORDS[:1], max_length=n_prompt - 1, too_long="truncate", learn=ALL).supervised[0] > 0


def test_the_fingerprint_tells_ids_and_masks_apart() -> None:
    same = encoded(RECORDS).fingerprint()
    assert encoded(RECORDS).fingerprint() == same
    others = [
        encoded(RECORDS, learn=ALL),
        encoded(RECORDS, template=PHI3),
        encoded(RECORDS[:-1]),
        encoded(RECORDS[::-1]),
        encoded([*RECORDS[:-1], replace(RECORDS[-1], output="other")]),
    ]
    prints = {other.fingerprint() for other in others}
    assert len(prints) == len(others)
    assert same not in prints


def test_no_records_are_an_empty_set() -> None:
    assert len(encoded([])) == 0


def test_rows_are_named_up_to_ten() -> None:
    assert name_rows([4]) == "row 4"
    assert name_rows([4, 9]) == "rows 4, 9"
    assert name_rows(range(1, 13)) == "rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more"


@pytest.mark.parametrize(("template", "mean"), [(ALPACA, 57.39), (PHI3, 39.91)], ids=["alpaca", "phi3"])
def test_the_books_rows(book_data: Path, template: Template, mean: float) -> None:
    records = load_records(str(book_data)).good
    some = encoded(records, template=template)
    assert some.report.encoded_apart == []
    assert round(float((some.lengths + 1).mean()), 2) == mean
    if template is ALPACA:
        assert ((some.lengths + 1).min(), (some.lengths + 1).max()) == (41, 92)
        train = encoded(records[:935])
        assert int(train.supervised.sum()) == 17_876
        assert int(encoded(records[:935], learn=ALL).supervised.sum()) == 52_760


def segments(row: int, *of: tuple[str, bool]) -> Record:
    turns = tuple(Turn("raw", text, learned) for text, learned in of)
    return Record(instruction="", output=of[-1][0], turns=turns, row=row)


def test_a_row_of_one_segment_is_no_document() -> None:
    """What comes behind it would else be cut into contexts with it, all of it learned."""
    some = encoded([segments(1, ("All of it.", True)), segments(2, ("Asked. ", False), ("Told.", True))])
    assert some.rows.tolist() == [1, 2]
    begin, end = some.spans_of(1)[0]
    assert TOKENIZER.decode(some[1][begin:end].tolist()) == "Told.<|endoftext|>"


def test_the_prompt_of_segments_is_what_training_has_before_the_last() -> None:
    """A segment that ends with a space is encoded apart from the next, and no end-of-text stands between them."""
    record = segments(1, ("Q: 1 + 1? ", False), ("2", True), (" Q: 2 + 2? ", False), ("4", True))
    some = encoded([record], learn=LAST)
    (prompt,) = prompts_of([record], ALPACA, TOKENIZER)
    assert some.report.encoded_apart == [1]
    assert some[0].tolist() == [*prompt, *TOKENIZER.encode("4"), END_OF_TEXT]
    assert len(some.spans_of(0)) == 2  # their labels say what is learned, whatever --train_on says
