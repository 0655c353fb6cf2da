from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fastft.common.errors import UserError
from fastft.judging.journal import Journal, Reply

FIRST = Reply("85", "stop", 90, 2)
THIRD = Reply("85", "stop", 90, 2, 1.5, "maybe 20")
SECOND = Reply("half a pair \ud83d,\nnext line \u2028 ende", "length", None, None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "judge-replies.jsonl"


def test_answers_are_read_back(path: Path) -> None:
    journal = Journal(path)
    journal.keep("a", FIRST)
    journal.keep("b", SECOND)
    journal.keep_judge("ollama llama3", {"digest": "x"})
    journal.keep("d", THIRD)
    again = Journal(path)
    assert again.reply("d") == THIRD
    assert (again.reply("a"), again.reply("b"), again.reply("c")) == (FIRST, SECOND, None)
    assert again.judge("ollama llama3") == {"digest": "x"}
    assert again.judge("ollama phi3") is None
    assert path.read_bytes().count(b"\n") == 4


def test_a_file_cut_anywhere_loses_at_most_its_last_answer(path: Path) -> None:
    """As a kill may leave it; and the next answer is whole."""
    Journal(path).keep("a", FIRST)
    first = path.read_bytes()
    Journal(path).keep("b", SECOND)
    whole = path.read_bytes()
    for length in range(len(first), len(whole)):
        path.write_bytes(whole[:length])
        journal = Journal(path)
        assert journal.reply("a") == FIRST
        journal.keep("c", SECOND)
        assert (Journal(path).reply("a"), Journal(path).reply("c")) == (FIRST, SECOND)


@pytest.mark.parametrize(
    "line", ["[", "[]", "3", "{}", '{"key": "a"}', '{"key": "a", "content": 3}', '"content"', "\xff"]
)
def test_what_is_no_answer_is_passed_over(path: Path, line: str) -> None:
    path.write_bytes(line.encode("latin-1") + b"\n")
    assert len(Journal(path)) == 0


def test_what_is_known_of_a_judge_is_written_once_and_replaced(path: Path) -> None:
    for digest in ("x", "x", "y"):
        Journal(path).keep_judge("llama3", {"digest": digest})
    assert len(path.read_bytes().splitlines()) == 2
    assert Journal(path).judge("llama3") == {"digest": "y"}


def test_judges_are_in_the_order_in_which_something_new_was_heard_of_them(path: Path) -> None:
    journal = Journal(path)
    for name, digest in (("a", "x"), ("b", "x"), ("a", "y")):
        journal.keep_judge(name, {"digest": digest})
    assert journal.judges() == Journal(path).judges() == ["b", "a"]


def test_threads_do_not_tear_each_others_lines(path: Path) -> None:
    journal = Journal(path)
    threads = [
        threading.Thread(target=lambda n=n: [journal.keep(f"{n} {i}", FIRST) for i in range(20)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Journal(path)) == 80


def test_a_folder_in_its_place_is_the_users_mistake(path: Path) -> None:
    path.mkdir()
    with pytest.raises(UserError, match=r"cannot read the judge's answers .*judge-replies\.jsonl"):
        Journal(path)
