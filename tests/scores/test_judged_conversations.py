"""Conversations: what the judge is asked about each turn, and the figures of that in scores, comparison and report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ollama_stub import OllamaStub, says, unused_url

from fastft.cli import main
from fastft.common.errors import UserError
from fastft.metrics.statistics import bootstrap_mean, holm, sign_flip
from fastft.metrics.text_metrics import names_it
from fastft.pages.render import number
from fastft.reports.figures import read_run
from fastft.reports.report import ReportOptions, report
from fastft.reports.talks import side_by_side
from fastft.scores.compare import CompareOptions, compare
from fastft.scores.score import ScoreOptions, score, summary_line

RESPONSES = [{"instruction": "Say one.", "input": "", "output": "one", "model_response": "one"}]


def turn(question: str, answer: str, reference: str | None = None, **more: str) -> dict[str, str]:
    return {"question": question, **({} if reference is None else {"reference": reference}), "answer": answer, **more}


TALKS: list[dict[str, Any]] = [
    {"id": 1, "category": "sums", "turns": [
        turn("What is 2 and 3?", "It is Five.", "five"), turn("Twice?", "nine", "ten"),
    ]},
    {"id": "sea", "category": "writing", "system": "Be kind.", "turns": [
        turn("Write.", "Waves."), turn("Shorter.", ""),
    ]},
]  # fmt: skip


def make_run(folder: Path, talks: Any = TALKS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "responses.json").write_text(json.dumps(RESPONSES))
    (folder / "conversations.json").write_text(json.dumps(talks))
    return folder


def scored(run: Path, *scores: int, **options: Any) -> dict[str, Any]:
    """Scores of a stub that gives 100 to the response, and the scores to the turns in order."""
    with OllamaStub(says("100"), *(says(str(one)) for one in scores)) as stub:
        return score(ScoreOptions(run=run, **{"judge_url": stub.url, "judge_retries": 0, **options}))


def test_each_turn_is_judged_with_the_conversation_so_far(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with OllamaStub(says("100"), says("80"), says("10"), says("60")) as stub:
        scores = score(ScoreOptions(run=run, judge_url=stub.url))
        _, first, second, third = stub.prompts()
        score(ScoreOptions(run=run, judge_url=stub.url))
        assert len(stub.asked) == 4  # every answer is kept
    assert "### Turn 1, the user said:\nWhat is 2 and 3?\n\n### Correct answer to turn 1:\nfive\n\n" in first
    assert "### Turn 1. The assistant's answer, which is to be scored:\nIt is Five.\n\n" in first
    assert "Twice?" not in first
    assert "Score the assistant's answer on a scale from 0 to 100" in first
    before, after = "### Turn 1. The assistant answered:\nIt is Five.", "### Turn 2, the user said:\nTwice?"
    assert second.index(before) < second.index(after)
    assert "### Correct answer to turn 1:\nfive" in second
    assert "### Correct answer to turn 2:\nten" in second
    assert "### Turn 2. The assistant's answer, which is to be scored:\nnine\n\n" in second
    assert "Score the assistant's answer in turn 2 on a scale" in second
    assert second.endswith("Respond with the integer number only.")
    assert "### System:\nBe kind.\n\n" in third
    assert "correct answer" not in third.casefold()
    judgements = [[one["score"] for one in talk["turns"]] for talk in scores["conversations"]]
    assert judgements == [[80, 10], [60, 0]]  # an empty answer has no question
    assert [talk["id"] for talk in scores["conversations"]] == [1, "sea"]


def test_the_figures_are_those_of_all_turns_and_of_the_first_and_second_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    summary = scored(run, 80, 10, 60)["summary"]
    found = summary["conversations"]
    assert (found["n"], found["n_turns"], found["n_scored"], found["judge_mean"]) == (2, 4, 4, 37.5)
    assert found["judge_interval"] == list(bootstrap_mean([45, 30]) or ())  # over conversations, of equal length
    assert [(one["turn"], one["n"], one["judge_mean"]) for one in found["turns"]] == [(1, 2, 70), (2, 2, 5)]
    assert found["by_category"]["sums"]["judge_mean"] == 45
    assert [one["judge_mean"] for one in found["by_category"]["writing"]["turns"]] == [60, 0]
    assert (found["named"]["n"], found["named"]["accuracy"]) == (2, 50)
    assert found["judge"]["model"] == "llama3"
    assert (summary["judge_mean"], summary["n"]) == (100, 1)  # the responses' own
    line = summary_line(summary)
    assert "; 2 conversations: judge's mean 37.50 [" in line
    assert line.endswith("over 4 of 4 turns, turn 1 70.00, turn 2 5.00; 50.00% of 2 answers say the short right one")


def test_turns_without_an_answer_or_a_score_are_in_no_mean_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talks = [*TALKS, {"id": 7, "turns": [turn("a", "b"), turn("c", "", "d", left_out="its prompt fills the context")]}]
    run = make_run(tmp_path / "run", talks)
    with OllamaStub(says("100"), says("80"), says("10"), says("none"), says("none"), says("90")) as stub:
        found = score(ScoreOptions(run=run, judge_url=stub.url))["summary"]["conversations"]
    assert (found["n_turns"], found["n_scored"], found["judge_mean"]) == (6, 4, 45)
    assert (found["unscored_turns"], found["left_out_turns"]) == (["sea, turn 1"], ["7, turn 2"])
    assert found["named"]["n"] == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "conversations: turns without a score: sea, turn 1" in said
    assert "conversations: turns without an answer, in no figure: 7, turn 2" in said


def test_without_a_judge_there_are_the_answers_that_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main(["score", "--run", str(run), "--judge_url", unused_url()]) == 0
    found = json.loads((run / "scores.json").read_text())["summary"]["conversations"]
    assert (found["judge_mean"], found["judge"], found["n_scored"]) == (None, None, 0)
    assert "ollama serve" in found["no_judge"]
    assert capsys.readouterr().out.rstrip().endswith("; 2 conversations: 50.00% of 2 answers say the short right one")
    kept = scored(run, 80, 10, 60)["summary"]["conversations"]
    again = score(ScoreOptions(run=run, judge="none"))["summary"]["conversations"]
    assert again["judge_mean"] == kept["judge_mean"] == 37.5  # of whoever judged before


def test_a_run_without_conversations_has_none_of_this(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])  # as a killed call leaves it
    scores = scored(run)
    assert scores["summary"]["conversations"] is None
    assert "conversations" not in scores
    assert "conversations" not in summary_line(scores["summary"])
    assert read_run(run).conversations is None


def test_a_run_that_has_only_talked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is scored, compared and reported by its conversations alone, and no server is asked what is known already."""
    runs = [make_run(tmp_path / name) for name in "ab"]
    for more, run in enumerate(runs):
        (run / "responses.json").unlink()
        with OllamaStub(*(says(str(one + more)) for one in (80, 10, 60))) as stub:
            summary = score(ScoreOptions(run=run, judge_url=stub.url))["summary"]
            assert len(stub.asked) == 3
        assert (summary["n"], summary["exact_match"], summary["responses_sha256"]) == (0, None, None)
        assert summary_line(summary).startswith("2 conversations: judge's mean ")
        score(ScoreOptions(run=run, judge_url=unused_url(), require_judge=True))
        with pytest.raises(UserError, match="got --data, which responses are held against"):
            score(ScoreOptions(run=run, data="sample", judge="none"))
    assert main(["compare", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert "2 conversations, judge's mean: A 37.50, B 38.25, A - B -0.75" in said
    assert "exact match" not in said
    assert main(["compare", *map(str, runs), "--pairwise"]) == 2
    assert "got --pairwise, and neither run has responses" in " ".join(capsys.readouterr().err.split())
    page = report(ReportOptions(run=runs[0])).read_text(encoding="utf-8")
    assert "It is Five." in page
    assert "There are no responses: make them with" in page
    assert "Exact match" not in page
    (runs[1] / "scores.json").unlink()
    assert main(["compare", *map(str, runs)]) == 2
    assert "of their conversations the conversations of" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "is an object, expected a list of conversations"),
        ([3], "conversation 1: expected an object with `id` and `turns`"),
        ([{"id": 1, "turns": []}], "conversation 1: expected an object"),
        ([TALKS[0], {"id": 2, "turns": [{"question": "a"}]}], "conversation 2: turn 1: expected an object with"),
        ([{"id": 2, "turns": [{"question": "a", "answer": "b", "reference": 3}]}], "turn 1: expected"),
    ],
)  # fmt: skip
def test_another_files_conversations_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    run = make_run(tmp_path / "run", content)
    with pytest.raises(UserError) as raised:
        score(ScoreOptions(run=run, judge="none"))
    assert words in str(raised.value)
    assert not (run / "scores.json").exists()


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("It is Rome.", "Rome", True), ("rome", "Rome", True), ("Romeo", "Rome", False), ("", "Rome", False),
        ("8, euros", "8 euros", True), ("euros 8", "8 euros", False), ("x", "", False), ("x", "?!", False),
        ("a b c", "b c", True), ("a b c", "c d", False),
    ],
)  # fmt: skip
def test_whether_an_answer_says_it(response: str, reference: str, *, expected: bool) -> None:
    assert names_it(response, reference) is expected


class TestComparing:
    @pytest.fixture
    def runs(self, tmp_path: Path) -> tuple[Path, Path]:
        a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", TALKS[::-1])
        scored(a, 80, 10, 60)  # 1: 80, 10; sea: 60, 0
        scored(b, 20, 30, 40)  # sea: 20, 0; 1: 30, 40
        return a, b

    def test_they_are_paired_by_conversation_whatever_their_order(
        self, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = compare(CompareOptions(*runs))["conversations"]
        assert (found["n"], found["a"], found["b"], found["difference"]) == (2, 37.5, 22.5, 15)
        assert found["interval"] == list(bootstrap_mean([10, 20]) or ())
        assert found["p"] == sign_flip([10, 20]).p
        first, second = found["turns"]
        assert (first["turn"], first["n"], first["a"], first["b"], first["difference"]) == (1, 2, 70, 25, 45)
        assert (second["turn"], second["n"], second["difference"]) == (2, 2, -15)
        assert main(["compare", *map(str, runs)]) == 0
        said = capsys.readouterr().out
        assert "2 conversations, judge's mean: A 37.50, B 22.50, A - B +15.00 95% [" in said
        assert "  turn 2: A 5.00, B 20.00, A - B -15.00" in said

    def test_what_does_not_compare_is_said(self, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
        a, b = runs
        scored(b, 20, 30, 40, judge_style="reason")
        result = compare(CompareOptions(a, b))
        assert result["conversations"] is None
        assert "other judges or with other options (--judge_style book and reason, " in result["no_conversations"]
        make_run(b, [TALKS[0]])
        assert "other conversations" in compare(CompareOptions(a, b))["no_conversations"]
        make_run(b, [TALKS[0], {**TALKS[1], "turns": [turn("Write.", "x"), turn("Shorter.", "y")]}])
        why = compare(CompareOptions(a, b))["no_conversations"]
        assert why == f"the scores of {b} are of other conversations; `fastft score --run {b}` makes them anew"
        (b / "scores.json").unlink()
        assert "have no scores; `fastft score --run" in compare(CompareOptions(a, b))["no_conversations"]
        assert main(["compare", str(a), str(b)]) == 0
        assert "the conversations are not compared: the conversations of" in capsys.readouterr().out
        (b / "conversations.json").unlink()
        result = compare(CompareOptions(a, b))
        assert (result["conversations"], result["no_conversations"]) == (None, None)

    def test_their_p_values_are_raised_with_all_others(
        self, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        result = compare(CompareOptions(*runs))
        talks = result["conversations"]
        rows = [result["judge"], *result["metrics"].values(), talks, *talks["turns"]]
        tested = [row for row in rows if row["p"] is not None]
        assert [row["p_of_all"] for row in tested] == holm([row["p"] for row in tested])
        assert talks["p_of_all"] > talks["p"]
        assert main(["compare", *map(str, runs)]) == 0
        assert f"p {talks['p']:.3f}, of all {talks['p_of_all']:.3f}" in capsys.readouterr().out

    def test_the_report_shows_what_was_said(self, runs: tuple[Path, Path]) -> None:
        """Side by side by what was asked, whatever the order, with each turn's score and the judge's reason."""
        a, b = runs
        reasons = [json.dumps({"reason": f"Reason <{n}>.", "score": n}) for n in (100, 11, 12, 13)]
        with OllamaStub(*map(says, reasons)) as stub:
            score(ScoreOptions(run=b, judge_url=stub.url, judge_style="reason"))
        rows = side_by_side([read_run(a).talks, read_run(b).talks])
        assert [row["id"] for row in rows] == [1, "sea"]
        (one, other) = rows[0]["turns"][0]["answers"]
        assert (one.answer, one.score, one.reason) == ("It is Five.", 80, None)
        assert (other.score, other.reason) == (12, "Reason <12>.")
        assert [turn["reference"] for turn in rows[0]["turns"]] == ["five", "ten"]
        page = report(ReportOptions(run=a, against=[b])).read_text(encoding="utf-8")
        assert "Reason &lt;12&gt;." in page
        assert page.index("What is 2 and 3?") < page.index("It is Five.") < page.index("Twice?")
        assert "Be kind." in page
        assert json.loads((a / "report.json").read_text())["runs"][0]["talks"][0]["scores"] == [80, 10]
        make_run(b, [TALKS[0]])
        (alone, beside) = (read_run(a).talks, read_run(b).talks)
        assert [turn.score for talk in beside for turn in talk.turns] == [None, None]  # the scores are of others
        assert side_by_side([alone, beside])[1]["turns"][0]["answers"][1] is None
        page = report(ReportOptions(run=a, against=[b])).read_text(encoding="utf-8")
        assert f"The conversations of b have no scores, or those of others: <code>fastft score --run {b}</code>" in page
        assert "It has not had this conversation." in page

    def test_the_report_has_their_figures(self, runs: tuple[Path, Path]) -> None:
        a, b = runs
        page = report(ReportOptions(run=a, against=[b])).read_text(encoding="utf-8")
        assert "Conversations, judge’s mean" in page
        held = json.loads((a / "report.json").read_text())["runs"]
        assert [one["conversations"]["judge_mean"] for one in held] == [37.5, 22.5]
        make_run(b, [TALKS[0]])
        assert read_run(b).conversations is None  # of others than are there

    def test_the_report_tests_what_compare_tests(self, runs: tuple[Path, Path]) -> None:
        """The same rows for conversations, the other run less this one; and p raised for all rows of the page."""
        a, b = runs
        page = report(ReportOptions(run=b, against=[a])).read_text(encoding="utf-8")
        (found,) = json.loads((b / "report.json").read_text())["differences"]
        compared = compare(CompareOptions(a, b))["conversations"]
        talks = found["conversations"]
        rows, theirs = [talks, *talks["turns"]], [compared, *compared["turns"]]
        for name in ("n", "a", "b", "difference", "interval", "p"):
            assert [row[name] for row in rows] == [row[name] for row in theirs]
        tested = [found["judge"], found["exact_match"], found["rouge_l"], *rows]
        assert [row["p_of_all"] for row in tested] == holm([row["p"] for row in tested])
        assert talks["p_of_all"] > talks["p"]
        text = " ".join(re.sub("<[^>]+>", " ", page).split())
        assert "Conversations, judge’s score (2 scored in both) +15.00" in text
        low, high = talks["turns"][1]["interval"]
        assert f"… turn 2 −15.00 {number(low)} to {number(high)} 1.000 1.000" in text
        assert "raised for the number of rows in the table (Holm)" in text

    def test_another_decoding_is_said(self, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
        """Though the responses were all decoded alike."""
        for run, temperature in zip(runs, (0.0, 1.0), strict=True):
            (run / "responses.made-from.json").write_text('{"temperature": 0.0}')
            (run / "conversations.made-from.json").write_text(json.dumps({"temperature": temperature}))
        assert main(["compare", *map(str, runs)]) == 0
        said = capsys.readouterr().out
        assert "the conversations' decoding differs: temperature 0.0 in A and 1.0 in B" in said
        assert "\nthe decoding differs" not in said
        page = report(ReportOptions(run=runs[1], against=[runs[0]])).read_text(encoding="utf-8")
        assert "The conversations were decoded otherwise: temperature 0.0 and 1.0." in page
        (runs[1] / "conversations.made-from.json").write_text('{"temperature": 0.0}')
        assert compare(CompareOptions(*runs))["conversations"]["differing_decoding"] == {}

    def test_the_report_says_why_conversations_are_not_compared(self, runs: tuple[Path, Path]) -> None:
        """And calls none of two judges' means the best."""
        a, b = runs
        page = report(ReportOptions(run=a, against=[b])).read_text(encoding="utf-8")
        assert '<td class="n best">37.50</td>' in page
        scored(b, 20, 30, 40, judge_style="reason")
        for run in runs:
            (run / "responses.json").unlink()
            held = json.loads((run / "scores.json").read_text())
            held["summary"].update(n=0, responses_sha256=None)
            (run / "scores.json").write_text(json.dumps({**held, "judgements": []}))
        page = report(ReportOptions(run=a, against=[b])).read_text(encoding="utf-8")
        assert "The conversations are not compared: the two runs were scored by other judges" in page
        assert '<td class="n">37.50</td>' in page
        assert '<td class="n best">37.50</td>' not in page
