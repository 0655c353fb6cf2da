from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ollama_stub import OllamaStub, completes, lines, says, status, thinks, unused_url
from scipy import stats

from fastft.cli import main
from fastft.common.errors import JudgeUnavailable, UserError
from fastft.judging.journal import Reply
from fastft.judging.ollama import OllamaServer
from fastft.judging.questions import Question
from fastft.judging.wire import Patience
from fastft.metrics import text_metrics as metrics
from fastft.metrics.statistics import holm
from fastft.run.folder import Run
from fastft.scores.compare import CompareOptions, compare, judge_figures, matched, metric_figures, swap_test
from fastft.scores.score import ScoreOptions, responses_sha256, score

ENTRIES: list[dict[str, Any]] = [
    {"instruction": f"Say {word}.", "input": "", "output": f"This is the word {word}.", "category": category}
    for word, category in [("one", "p"), ("two", "p"), ("three", "q"), ("four", "q"), ("five", "q")]
]
A = [entry["output"] for entry in ENTRIES[:4]] + ["five"]
B = ["This is the word one.", "This is a word.", "", "four", "five"]
JUDGE = {"name": "ollama", "model": "llama3", "options": {"seed": 123, "num_ctx": 2048}}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patience, "before_retry", lambda *_: 0.0)


def make_run(folder: Path, responses: list[str], scores: list[int | None] | None = None, **judge: Any) -> Path:
    folder.mkdir(exist_ok=True)
    entries = [{**entry, "model_response": text} for entry, text in zip(ENTRIES, responses, strict=True)]
    (folder / "responses.json").write_text(json.dumps(entries))
    if scores is not None:
        summary = {"responses_sha256": responses_sha256(folder), "judge": {**JUDGE, **judge}}
        judgements = [{"score": one, "raw": str(one)} for one in scores]
        (folder / "scores.json").write_text(json.dumps({"summary": summary, "judgements": judgements}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return make_run(tmp_path / "a", A, [100, 90, 80, 100, 40]), make_run(tmp_path / "b", B, [100, 30, 0, 20, None])


def compared(runs: tuple[Path, Path], **options: Any) -> dict[str, Any]:
    chosen = CompareOptions(*runs, **options)
    result = compare(chosen)
    assert json.loads(chosen.path().read_text()) == json.loads(json.dumps(result))
    return result


def test_the_judges_scores_are_paired_over_entries_that_both_have(runs: tuple[Path, Path]) -> None:
    judged = compared(runs)["judge"]
    assert (judged["n"], judged["n_left_out"]) == (4, 1)
    assert (judged["a"], judged["b"], judged["difference"]) == (92.5, 37.5, 55)
    assert judged["interval"][0] < 55 < judged["interval"][1]
    assert (judged["p"], judged["exact"]) == (0.25, True)  # of three differences, all one way: 2 of 8
    tally = judged["win_tie_loss"]
    assert (tally["wins"], tally["ties"], tally["losses"], tally["win_rate"]) == (3, 1, 0, 1)
    assert judged["by_category"]["p"] == {"n": 2, "difference": 30, "interval": [0, 60]}
    assert judged["by_category"]["q"]["n"] == 2


def test_length_bias_is_the_correlation_of_the_differences(runs: tuple[Path, Path]) -> None:
    bias = compared(runs)["judge"]["length_bias"]
    scores, words = [0, 60, 80, 80], [0, 1, 5, 4]
    assert bias["words"] == 2.5
    assert bias["pearson"] == pytest.approx(stats.pearsonr(scores, words).statistic)
    assert bias["spearman"] == pytest.approx(stats.spearmanr(scores, words).statistic)


def test_text_metrics_are_those_of_each_run_and_their_difference(runs: tuple[Path, Path]) -> None:
    found = compared(runs)["metrics"]
    assert set(found) >= {"exact_match", "bleu", "chrf", "rouge_l", "words"}
    outputs = [entry["output"] for entry in ENTRIES]
    ours, theirs = (metrics.text_metrics(texts, outputs) for texts in (A, B))
    for name, row in found.items():
        assert row["a"] == pytest.approx(ours[name])
        assert row["difference"] == pytest.approx(ours[name] - theirs[name])
        assert row["interval"][0] <= row["difference"] <= row["interval"][1], name
    assert found["exact_match"]["p"] == 0.25


def test_each_row_has_its_p_among_all_rows(runs: tuple[Path, Path]) -> None:
    result = compared(runs)
    rows = [result["judge"], *result["metrics"].values()]
    assert [row["p_of_all"] for row in rows] == holm([row["p"] for row in rows])
    assert any(row["p_of_all"] > row["p"] for row in rows)


def test_the_swap_test_of_a_mean_is_scipys_and_of_bleu_swaps_texts() -> None:
    outputs = [entry["output"] for entry in ENTRIES]
    ours, theirs = metrics.measures(A, outputs), metrics.measures(B, outputs)
    a, b = ours["rouge_l"].counts[:, 0], theirs["rouge_l"].counts[:, 0]
    expected = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert swap_test(ours["rouge_l"], theirs["rouge_l"]).p == pytest.approx(expected.pvalue)
    observed, extreme = abs(ours["bleu"].figure() - theirs["bleu"].figure()), 0
    for pattern in range(2**5):
        sides = [(y, x) if pattern >> i & 1 else (x, y) for i, (x, y) in enumerate(zip(A, B, strict=True))]
        figures = [metrics.bleu([side[k] for side in sides], outputs) or 0 for k in (0, 1)]
        extreme += abs(figures[0] - figures[1]) >= observed - 1e-9
    assert swap_test(ours["bleu"], theirs["bleu"]).p == pytest.approx(extreme / 2**5)


def test_a_paired_interval_uses_the_pairing() -> None:
    """Runs that differ a little in every entry: an unpaired interval would be wide."""
    random = np.random.default_rng(0)
    level = random.normal(50, 30, 100)
    judged = judge_figures(level + 2 + random.normal(0, 1, 100), level, np.zeros(100))
    assert judged is not None
    assert 1.5 < judged["interval"][0] < judged["interval"][1] < 2.5
    assert judged["length_bias"]["pearson"] is None


def test_a_run_beside_itself_differs_in_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", A, [1, 2, 3, 4, 5])
    result = compared((run, run))
    for row in [result["judge"], *result["metrics"].values()]:
        assert (row["difference"], row["interval"], row["p"]) == (0, [0, 0], 1)


def test_entries_are_matched_whatever_their_order(runs: tuple[Path, Path]) -> None:
    first = compared(runs)
    entries = json.loads((runs[1] / "responses.json").read_text())
    order = [3, 1, 4, 0, 2]
    make_run(runs[1], B, [100, 30, 0, 20, None])
    (runs[1] / "responses.json").write_text(json.dumps([entries[i] for i in order]))
    scores = json.loads((runs[1] / "scores.json").read_text())
    scores["judgements"] = [scores["judgements"][i] for i in order]
    scores["summary"]["responses_sha256"] = responses_sha256(runs[1])
    (runs[1] / "scores.json").write_text(json.dumps(scores))
    again = compared(runs)
    assert (again["judge"], again["metrics"]) == (first["judge"], first["metrics"])


def test_an_entry_that_stands_twice_is_matched_in_order() -> None:
    entry = {"instruction": "i", "input": "", "output": "o"}
    other = {**entry, "output": "p"}
    assert matched([entry, other, entry], [other, entry, entry], Path("a"), Path("b")) == [1, 0, 2]


def test_other_entries_are_refused_with_their_number(runs: tuple[Path, Path]) -> None:
    entries = json.loads((runs[1] / "responses.json").read_text())
    entries[1]["output"] = "another reference"
    (runs[1] / "responses.json").write_text(json.dumps(entries[:4]))
    with pytest.raises(UserError, match=r"2 of 5 of the first \(first: row 2\).*1 of 4 of the second"):
        compare(CompareOptions(*runs))
    assert not list(runs[0].glob("compare*"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda _, b: (b / "scores.json").unlink(), "has no scores; `fastft score --run"),
        (lambda _, b: make_run(b, B, [None] * 5), "has no scores"),
        (lambda _, b: make_run(b, ["x", *B[1:]]), "are of other responses"),
        (lambda _, b: make_run(b, B, [1] * 5, model="phi3"), r"other judges.*llama3 and phi3"),
        (lambda _, b: make_run(b, B, [1] * 5, options={"seed": 1}), "other options"),
    ],
    ids=["missing", "all null", "stale", "another model", "other options"],
)
def test_without_comparable_scores_the_text_metrics_alone_are_compared(
    runs: tuple[Path, Path], spoil: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(*runs)
    result = compared(runs)
    assert result["judge"] is None
    assert result["metrics"]["exact_match"]["n"] == 5
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(said) == 1
    assert said[0].startswith("the text metrics alone are compared: ")
    with pytest.raises(UserError, match=words):
        raise UserError(said[0])


def test_another_context_is_the_same_judge(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", A, [1] * 5)
    b = make_run(tmp_path / "b", B, [1] * 5, options={**JUDGE["options"], "num_ctx": 4096})
    assert compared((a, b))["judge"]["n"] == 5


def test_what_fastft_score_wrote_is_compared(tmp_path: Path) -> None:
    runs = make_run(tmp_path / "a", A), make_run(tmp_path / "b", B)
    with OllamaStub(*(says(str(10 * i)) for i in range(1, 8))) as stub:
        for run in runs:
            score(ScoreOptions(run=run, judge_url=stub.url))
    assert compared(runs)["judge"]["n"] == 5


def test_multiple_choice_is_compared_over_its_entries(tmp_path: Path) -> None:
    runs = make_run(tmp_path / "a", ["A", "B", *A[2:]]), make_run(tmp_path / "b", ["B", "B", *B[2:]])
    for run in runs:
        entries = json.loads((run / "responses.json").read_text())
        for entry in entries[:2]:
            entry["choices"], entry["output"] = ["yes", "no"], "yes"
        (run / "responses.json").write_text(json.dumps(entries))
    row = compared(runs)["metrics"]["multiple_choice"]
    assert (row["n"], row["a"], row["b"], row["difference"]) == (2, 50, 0, 50)


def test_multiple_choice_is_compared_where_both_have_the_same_choices(tmp_path: Path) -> None:
    runs = (
        make_run(tmp_path / "a", ["yes", "no", "no", "x", "x"]),
        make_run(tmp_path / "b", ["no", "no", "no", "x", "x"]),
    )
    for run, choices in zip(runs, ([["yes", "no"]] * 3, [["yes", "no"], ["no", "yes"]]), strict=True):
        entries = json.loads((run / "responses.json").read_text())
        for entry, given in zip(entries, choices, strict=False):
            entry["choices"] = given
        for entry in entries[:3]:
            entry["output"] = "yes"
        (run / "responses.json").write_text(json.dumps(entries))
    row = compared(runs)["metrics"]["multiple_choice"]
    assert (row["n"], row["a"], row["b"]) == (1, 100, 0)


def test_runs_of_one_name_do_not_write_over_each_other(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", A)
    others = [tmp_path / name / "s" for name in ("x", "y")]
    for other in others:
        other.parent.mkdir()
        make_run(other, B)
    compared((a, others[0]))
    compared((a, others[0]))
    with pytest.raises(UserError, match=r"compare-s\.json compares with another run.*--out"):
        compare(CompareOptions(a, others[1]))
    others[0].rename(tmp_path / "moved")
    compared((a, others[1]))


def test_a_folders_name_is_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = make_run(tmp_path / "run[v2]", A), make_run(tmp_path / "b", B)
    assert main(["compare", *map(str, runs)]) == 0
    assert "run[v2]" in capsys.readouterr().out.partition("judge")[0]


def test_pairwise_asks_both_orders_and_a_second_call_asks_nothing(runs: tuple[Path, Path]) -> None:
    with OllamaStub(says("A"), says("B"), says("B"), says("B")) as stub:
        first = compared(runs, pairwise=True, judge_url=stub.url)
        found = first["pairwise"]
        # Entries 1 and 5 are the same text, B is empty in 3: two pairs are asked about, each twice.
        assert [one["winner"] for one in found["judgements"]] == ["tie", "a", "a", "tie", "tie"]
        assert (found["wins"], found["ties"], found["losses"], found["flips"]) == (2, 3, 0, 1)
        assert len(stub.asked) == 4
        prompts = [asked["messages"][0]["content"] for asked in stub.asked]
        assert "A `This is the word two.`" in prompts[0]
        assert "B `This is the word two.`" in prompts[1]
        assert compared(runs)["pairwise"] is None
        assert compared(runs, pairwise=True, judge_url=stub.url) == first
        assert len(stub.asked) == 4


def test_an_openai_compatible_server_can_be_the_judge(runs: tuple[Path, Path]) -> None:
    with OllamaStub(completes("A"), completes("B"), completes("B"), completes("A")) as stub:
        found = compared(runs, pairwise=True, judge="openai", judge_model="llama3:latest", judge_url=f"{stub.url}/v1")[
            "pairwise"
        ]
    assert [one["winner"] for one in found["judgements"]] == ["tie", "a", "a", "b", "tie"]
    assert found["judge"]["name"] == "openai"


def test_a_killed_comparison_goes_on_where_it_stopped(runs: tuple[Path, Path]) -> None:
    with OllamaStub(says("A"), says("B"), says("A"), says("B")) as stub:
        ask, asked = OllamaServer.ask, []

        def killed_at_the_third(self: OllamaServer, question: Question) -> Reply:
            asked.append(question)
            if len(asked) == 3:
                raise KeyboardInterrupt
            return ask(self, question)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OllamaServer, "ask", killed_at_the_third)
            with pytest.raises(KeyboardInterrupt):
                compare(CompareOptions(*runs, pairwise=True, judge_url=stub.url))
        found = compared(runs, pairwise=True, judge_url=stub.url)["pairwise"]
        assert (found["n_unread"], found["wins"], len(stub.asked)) == (0, 3, 4)


def test_a_new_training_run_takes_old_comparisons_away(runs: tuple[Path, Path]) -> None:
    compared(runs)
    assert runs[0] / "compare-b.json" in Run(runs[0]).written()


def test_pairwise_without_a_judge_keeps_the_rest(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    result = compared(runs, pairwise=True, judge_url=unused_url())
    assert "ollama serve" in result["pairwise"]["no_judge"]
    assert result["judge"]["n"] == 4
    assert "no pairwise judge, everything else is kept" in capsys.readouterr().err
    with pytest.raises(JudgeUnavailable, match="ollama serve"):
        compare(CompareOptions(*runs, pairwise=True, require_judge=True, judge_url=unused_url()))


def test_a_second_comparison_needs_no_server(runs: tuple[Path, Path]) -> None:
    with OllamaStub(says("A"), says("B"), says("B"), says("B")) as stub:
        first = compared(runs, pairwise=True, judge_url=stub.url)
        stub.models.clear()  # a judge that is no longer there
        assert compared(runs, pairwise=True, require_judge=True, judge_url=stub.url) == first


def test_a_missing_judge_is_pulled(runs: tuple[Path, Path]) -> None:
    with OllamaStub(says("A"), says("B")) as stub:
        models = dict(stub.models)
        stub.models.clear()

        def pull(handler: Any) -> None:
            stub.models.update(models)
            lines(b'{"status": "success"}\n')(handler)

        stub.pull = pull
        assert compared(runs, pairwise=True, pull=True, judge_url=stub.url)["pairwise"]["no_judge"] is None
        assert [payload["model"] for payload in stub.pulls] == ["llama3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairwise": True, "judge": "openai"}, "expected --judge_url with it"),
        ({"pairwise": True, "judge_timeout": -1.0}, "got --judge_timeout -1.0"),
    ],
)
def test_options_that_do_not_fit_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        CompareOptions(Path("a"), Path("b"), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["[]", '{"weights": 1}', "{"])
def test_a_file_of_something_else_is_not_written_over(runs: tuple[Path, Path], content: str) -> None:
    path = runs[0] / "compare-b.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"compare-b\.json"):
        compare(CompareOptions(*runs))
    assert path.read_text() == content


def test_a_failed_question_is_listed_and_asked_again_by_the_next_call(runs: tuple[Path, Path]) -> None:
    with OllamaStub(status(400, "bad"), says("A"), says("B"), says("A"), says("B")) as stub:
        found = compared(runs, pairwise=True, judge_url=stub.url)["pairwise"]
        assert (found["judgements"][1]["winner"], found["n_unread"]) == (None, 1)
        assert "bad" in found["judgements"][1]["reason"]
        assert compared(runs, pairwise=True, judge_url=stub.url)["pairwise"]["n_unread"] == 0
        assert len(stub.asked) == 5


def test_where_the_figures_go(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert CompareOptions(*runs).path() == runs[0] / "compare-b.json"
    assert CompareOptions(*runs, out=tmp_path).path() == tmp_path / "compare.json"
    assert CompareOptions(*runs, out=tmp_path / "x.json").path() == tmp_path / "x.json"


def test_the_command_prints_a_table(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with OllamaStub(says("A"), says("B"), says("B"), says("B")) as stub:
        assert main(["compare", "--pairwise", *map(str, runs), "--judge_url", stub.url]) == 0
    said = capsys.readouterr().out
    for words in ("judge's mean", "92.50", "+55.00", "chrF", "BLEU", "A wins 3, ties 1, loses 0", "correlate"):
        assert words in said, words
    assert "the orders disagree on 1 of 2 pairs (50%)" in said
    assert str(runs[0] / "compare-b.json") in said


def test_a_metric_that_is_undefined_is_a_row_of_dashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = make_run(tmp_path / "a", ["x"] * 5), make_run(tmp_path / "b", ["y"] * 5)
    for run in runs:
        entries = json.loads((run / "responses.json").read_text())
        for entry, output in zip(entries, ["👍", "👎", "x", "y", "x"], strict=True):
            entry["output"] = output
        (run / "responses.json").write_text(json.dumps(entries))
    assert main(["compare", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    for name in ("BLEU, %", "ROUGE-2 F1, %"):
        assert next(line for line in said.splitlines() if name in line).split(name)[1].split() == ["–"] * 6
    assert "ROUGE-L F1, %: over 3 of 5 entries" in said
    found = json.loads((runs[0] / "compare-b.json").read_text())["metrics"]
    assert (found["rouge_2"]["n"], found["rouge_2"]["a"], found["rouge_2"]["p_of_all"]) == (0, None, None)
    row = found["rouge_l"]
    assert (row["n"], row["a"], row["b"]) == (3, pytest.approx(200 / 3), pytest.approx(100 / 3))


def test_a_pairwise_judge_without_a_verdict_is_no_usable_judge(runs: tuple[Path, Path]) -> None:
    with OllamaStub(thinks("A is better, no, B is")) as stub:
        options = CompareOptions(*runs, pairwise=True, require_judge=True, judge_url=stub.url)
        for _ in range(2):  # also where every reply is there already
            with pytest.raises(
                JudgeUnavailable, match=r"no verdict on any of 2 pairs.*took all 4096 tokens.*--judge_tokens"
            ):
                compare(options)
    found = json.loads(options.path().read_text())["pairwise"]
    assert found["n_unread"] == 2


WHY = "its prompt fills the context of 256 tokens"


def leave_out(run: Path, *rows: int) -> None:
    """As if `generate` had left out these rows, counted from 1, and the run had been scored since."""
    path = run / "responses.json"
    entries = json.loads(path.read_text())
    for row in rows:
        entries[row - 1] |= {"model_response": "", "left_out": WHY}
    path.write_text(json.dumps(entries))
    scores = json.loads((run / "scores.json").read_text())
    scores["summary"]["responses_sha256"] = responses_sha256(run)
    for row in rows:
        scores["judgements"][row - 1]["score"] = None
    (run / "scores.json").write_text(json.dumps(scores))


def test_entries_that_one_run_left_out_are_not_compared_and_are_said(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = compared(runs)
    leave_out(runs[0], 1)
    leave_out(runs[1], 1, 3)
    result = compared(runs)
    assert (whole["n"], whole["left_out_rows"]) == (5, {"a": [], "b": []})
    assert (result["n"], result["left_out_rows"]) == (3, {"a": [1], "b": [1, 3]})
    assert (result["metrics"]["exact_match"]["a"], result["metrics"]["exact_match"]["n"]) == (pytest.approx(200 / 3), 3)
    assert (result["judge"]["n"], result["judge"]["n_left_out"], result["judge"]["a"]) == (2, 1, 95)
    assert list(result["judge"]["by_category"]) == ["p", "q"]
    assert main(["compare", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert "2 more entries are not compared, since generate left out 1 of them in A and 2 in B" in said
    assert "3 test entries" in said


def test_pairs_are_named_by_their_rows_where_some_were_left_out(runs: tuple[Path, Path]) -> None:
    leave_out(runs[0], 2)
    with OllamaStub(says("A", prompt_eval_count=2000)) as stub:
        found = compared(runs, pairwise=True, judge_url=stub.url)["pairwise"]
    assert [one["row"] for one in found["judgements"]] == [1, 3, 4, 5]
    assert found["cut_rows"] == [4]
    assert not any(entry in prompt for prompt in stub.prompts() for entry in ("Say two.",))


def test_runs_of_which_each_left_out_the_others_entries_do_not_compare(runs: tuple[Path, Path]) -> None:
    leave_out(runs[0], 1, 2)
    leave_out(runs[1], 3, 4, 5)
    with pytest.raises(UserError, match="left out each of the 5 entries"):
        compared(runs)


def test_scores_with_another_number_of_judgements_are_the_users_mistake(runs: tuple[Path, Path]) -> None:
    path = runs[1] / "scores.json"
    scores = json.loads(path.read_text())
    path.write_text(json.dumps({**scores, "judgements": scores["judgements"][:2]}))
    with pytest.raises(UserError, match="2 judgements of 5 responses"):
        compared(runs)


def test_metrics_that_one_run_lacks_are_left_out() -> None:
    measure = metrics.exact_match_measure(["a"], ["a"])
    assert metric_figures({"exact_match": measure}, {}) == {}


def named(run: Path, name: str, responses: list[str], **decoding: Any) -> None:
    """Responses of a name in a run, with what they were decoded with."""
    make_run(run.parent / "other", responses, [50, 40, 30, 20, 10])
    for kind in ("responses", "scores"):
        (run.parent / "other" / f"{kind}.json").rename(run / f"{kind}.{name}.json")
    (run / f"responses.{name}.made-from.json").write_text(json.dumps({"temperature": 0.0, **decoding}))


def test_two_decodings_of_a_run_are_compared(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = runs
    (run / "responses.made-from.json").write_text('{"temperature": 0.0, "repetition_penalty": 1.0}')
    named(run, "t1.0", B, temperature=1.0, top_p=0.9, seed=3, repetition_penalty=1.0)
    assert main(["compare", str(run), str(run), "--name", "test", "t1.0"]) == 0
    result = json.loads((run / "compare-a.test-t1.0.json").read_text())
    assert result["names"] == [None, "t1.0"]
    assert result["differing_decoding"] == {"temperature": [0.0, 1.0], "top_p": [1.0, 0.9]}
    assert (result["judge"]["a"], result["judge"]["b"]) == (82, 30)
    assert result["metrics"]["exact_match"] == compared(runs)["metrics"]["exact_match"]
    said = capsys.readouterr().out
    assert f"A {run}   B {run} (t1.0)   5 test entries" in said
    assert "the decoding differs: temperature 0.0 in A and 1.0 in B, top_p 1.0 in A and 0.9 in B" in said
    assert "without scores" not in said


def test_a_name_is_both_runs(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for run in runs:
        named(run, "greedy", B)
    result = compared(runs, name="greedy")
    assert (result["names"], result["differing_decoding"]) == (["greedy", "greedy"], {})
    for nothing in ("", []):
        with pytest.raises(UserError, match="got --name"):
            CompareOptions(*runs, name=nothing)
    assert (runs[0] / "compare-b.greedy.json").is_file()
    assert result["judge"]["difference"] == 0
    (runs[1] / "responses.greedy.made-from.json").unlink()
    assert main(["compare", *map(str, runs), "--name", "greedy"]) == 0
    assert "nothing says how B was decoded" in capsys.readouterr().out
    (runs[1] / "scores.greedy.json").unlink()
    assert "has no scores; `fastft score --run" in (no_judge := compared(runs, name="greedy")["no_judge"])
    assert f"{runs[1]} (greedy)" in no_judge
    assert f"`fastft score --run {runs[1]} --name greedy`" in no_judge


def test_a_comparison_of_other_names_is_not_written_over(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for run in runs:
        named(run, "greedy", B)
    compared(runs, out=tmp_path / "c.json")
    with pytest.raises(UserError, match=r"c\.json compares the responses test and test; choose another file"):
        compare(CompareOptions(*runs, name=["greedy", "test"], out=tmp_path / "c.json"))
    assert json.loads((tmp_path / "c.json").read_text())["names"] == [None, None]
    with pytest.raises(UserError, match="got --name a b c, expected one name, or two"):
        CompareOptions(*runs, name=["a", "b", "c"])
    with pytest.raises(UserError, match="got --name val, which is reserved"):
        CompareOptions(*runs, name=["greedy", "val"])


def test_what_differs_between_two_judges_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_run(tmp_path / "a", A, [1] * 5, style="book", rubric=None)
    rubric = "Right is good, wrong is bad, and long is not better."
    options = {"seed": 123, "temperature": 0.5, "num_ctx": 4096}
    b = make_run(tmp_path / "b", B, [1] * 5, model="phi3", style="reason", rubric=rubric, options=options)
    result = compared((a, b))
    assert result["differing_judge"] == {
        "model": ["llama3", "phi3"], "--judge_style": ["book", "reason"], "rubric": [None, rubric],
        "temperature": [None, 0.5],
    }  # fmt: skip
    assert result["no_judge"].endswith(
        "(model llama3 and phi3, --judge_style book and reason, rubric none and Right is good, wrong is ..., "
        "temperature none and 0.5); score both alike"
    )
    assert result["no_judge"] in capsys.readouterr().err
    assert compared((a, a))["differing_judge"] == {}
