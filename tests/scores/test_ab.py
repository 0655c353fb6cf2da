"""People as judges: what the page asks, what it gives away, and what its ratings say of the runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from rating_pages import entries, exported, judge, made_page, page_data, rated, says, two_runs, write_run

from fastft.cli import main
from fastft.common.errors import UserError
from fastft.reports.report import ReportOptions, report
from fastft.scores.ab import AbOptions, make_page, make_sheet
from fastft.scores.ratings import import_ratings


def imported(*files: Path) -> dict[str, Any]:
    path, result = import_ratings(AbOptions(import_=list(files)))
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    return result


# --- The page ---


def test_the_page_asks_every_question_that_the_runs_answer_differently(tmp_path: Path) -> None:
    items = page_data(made_page(tmp_path))["items"]
    assert sorted(item["item"] for item in items) == list(range(2, 11))
    assert [item["item"] for item in items] != list(range(2, 11))
    for item in items:
        assert {item["a"].split()[0], item["b"].split()[0]} == {"ada", "bob"}
        assert item["instruction"] == f"Write {item['item'] - 1} in words."


def test_sides_are_even_and_follow_the_seed(tmp_path: Path) -> None:
    runs = two_runs(tmp_path, 60)
    sheets = [make_sheet(runs, seed, None) for seed in (1, 1, 2)]
    assert sheets[0] == sheets[1]
    assert sheets[0].page == sheets[1].page != sheets[2].page
    assert sum(sheets[0].first_is_a) == 30  # of 59
    for sheet in sheets:
        lengths = [len(list(run)) for _, run in itertools.groupby(sheet.first_is_a)]
        assert len(lengths) > 15  # neither blocks nor one side alone
        assert max(lengths) < 15


def test_sides_are_those_that_the_sheet_says(tmp_path: Path) -> None:
    sheet = make_sheet(two_runs(tmp_path, 60), 5, None)
    for item, first_is_a in zip(sheet.items, sheet.first_is_a, strict=True):
        assert item.a.startswith("ada") == first_is_a
        assert item.b.startswith("bob") == first_is_a


def test_a_limit_draws_some_of_the_questions(tmp_path: Path) -> None:
    runs = two_runs(tmp_path, 60)
    assert len(make_sheet(runs, 1, 7).items) == 7
    assert len(make_sheet(runs, 1, 500).items) == 59
    drawn = {tuple(item.item for item in make_sheet(runs, seed, 7).items) for seed in range(5)}
    assert len(drawn) == 5


def test_what_generate_left_out_is_not_asked_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = two_runs(tmp_path)
    cut = entries("ada")
    cut[3] |= {"model_response": "", "left_out": "its prompt fills the context"}
    write_run(first, cut)
    sheet = make_sheet((first, second), 1, None)
    assert sorted(item.item for item in sheet.items) == [2, 3, *range(5, 11)]
    assert sheet.n_same == 1
    assert "1 of 10 questions are not asked about" in " ".join(capsys.readouterr().err.split())


def test_the_reference_can_be_left_out(tmp_path: Path) -> None:
    shown, hidden = (page_data(made_page(tmp_path, reference=reference)) for reference in (True, False))
    assert all(item["reference"] for item in shown["items"])
    assert all(item["reference"] is None for item in hidden["items"])
    assert shown["page"] == hidden["page"]


def test_hostile_answers_stay_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- \u2028 & \ud83d"
    first, second = two_runs(tmp_path)
    write_run(first, [{**entry, "model_response": evil} for entry in entries("ada")])
    page = make_page(AbOptions(first, second))
    assert "alert(1)</script>" not in page.read_text(encoding="utf-8")
    assert {evil} <= {item[side] for item in page_data(page)["items"] for side in ("a", "b")}


def test_runs_may_answer_in_another_order(tmp_path: Path) -> None:
    first, second = two_runs(tmp_path)
    judge(first, [*range(10)])
    judge(second, [*range(100, 90, -1)])
    write_run(tmp_path / "turned", entries("bob")[::-1])
    judge(tmp_path / "turned", [*range(91, 101)])
    results = []
    for other in (second, tmp_path / "turned"):
        page = make_page(AbOptions(first, other))
        results.append(imported(exported(tmp_path, rated(page, "Eve", says("ada")))))
    assert results[0]["page"] == results[1]["page"]
    assert results[0]["agreement"] == results[1]["agreement"]


# --- The ratings ---


def test_a_rater_who_likes_one_run_makes_it_win(tmp_path: Path) -> None:
    page = made_page(tmp_path)
    result = imported(exported(tmp_path, rated(page, "Eve", says("ada"))))
    assert (result["n_items"], result["n_rated"], result["n_same_text"]) == (9, 9, 1)
    assert result["verdicts"]["first"]["n"] == 9
    assert result["win_rate"]["rate"] == 1
    assert result["win_rate"]["p"] == 2 / 2**9
    assert 0.6 < result["win_rate"]["interval"][0] < 0.75
    assert result["scale"]["first"]["mean"] == 5
    assert result["scale"]["difference"]["mean"] == 3
    assert result["raters"] == [{"name": "Eve", "n": 9, "median_seconds": 3.5}]
    assert result["agreement"]["raters"] is None
    assert result["position"]["n"] == 9
    assert result["position"]["rate_a"] == 0.5  # who likes a run likes no letter


def test_a_rater_who_likes_a_letter_makes_nobody_win(tmp_path: Path) -> None:
    page = make_page(AbOptions(*two_runs(tmp_path, 61)))
    file = rated(page, "Eve", says("ada"))
    for row in file["ratings"]:
        row.update(choice="a", scale_a=4, scale_b=1)
    result = imported(exported(tmp_path, file))
    assert (result["win_rate"]["wins"], result["win_rate"]["losses"]) == (30, 30)
    assert result["win_rate"]["p"] == 1
    assert result["scale"]["difference"]["mean"] == 0
    assert result["position"]["rate_a"] == 1
    assert result["position"]["interval"] == (1, 1)


def test_raters_who_agree_and_who_do_not(tmp_path: Path) -> None:
    page = made_page(tmp_path)
    files = [
        exported(tmp_path, rated(page, "Eve", says("ada")), "1.json"),
        exported(tmp_path, rated(page, "Max", says("bob")), "2.json"),
    ]
    result = imported(*files)
    assert result["verdicts"]["tie"]["n"] == 9  # as many votes for each
    assert result["scale"]["first"]["mean"] == result["scale"]["second"]["mean"] == 3.5
    assert result["agreement"]["raters"]["alpha_choice"] < 0
    assert result["agreement"]["raters"]["pairs"][0]["same"] == 0
    third = rated(page, "Zoe", says("ada"))
    third["ratings"] = third["ratings"][:4]  # who did not finish
    result = imported(*files, exported(tmp_path, third, "3.json"))
    assert (result["verdicts"]["first"]["n"], result["verdicts"]["tie"]["n"]) == (4, 5)
    pairs = {tuple(pair["raters"]): pair for pair in result["agreement"]["raters"]["pairs"]}
    assert (pairs["Eve", "Zoe"]["n"], pairs["Eve", "Zoe"]["same"]) == (4, 1)
    assert (pairs["Max", "Zoe"]["n"], pairs["Max", "Zoe"]["same"]) == (4, 0)


def test_ratings_that_are_imported_one_by_one_say_whose_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = made_page(tmp_path)
    eve, other = (exported(tmp_path, rated(page, name, says("ada")), f"{name}.json") for name in ("Eve", "Max"))
    imported(eve)
    imported(eve, other)
    assert "no longer" not in capsys.readouterr().err
    result = imported(other)
    assert [one["name"] for one in result["raters"]] == ["Max"]
    said = " ".join(capsys.readouterr().err.split())
    assert "ab.json has no longer the ratings of Eve: --import takes the files of all raters at once" in said


def test_full_agreement_over_several_choices_is_an_alpha_of_1(tmp_path: Path) -> None:
    page = made_page(tmp_path)
    file = rated(page, "Eve", says("ada"))
    file["ratings"][0].update(choice="tie", scale_a=3, scale_b=3)
    file["ratings"][1].update(choice="both_bad", scale_a=1, scale_b=1)
    twin = {**file, "rater": "Max"}
    agreement = imported(exported(tmp_path, file, "1.json"), exported(tmp_path, twin, "2.json"))["agreement"]["raters"]
    assert agreement["alpha_choice"] == agreement["alpha_scale"] == agreement["pairs"][0]["kappa"] == 1


def test_ratings_without_a_scale_are_summed_up_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = made_page(tmp_path)
    files = []
    for n, (rater, likes, reason) in enumerate((("Eve", "ada", "clearer "), ("Max", "ada", ""), ("Zoe", "bob", None))):
        file = rated(page, rater, says(likes))
        for row in file["ratings"]:
            row.update(scale_a=None, scale_b=None, reason=reason)
        files.append(exported(tmp_path, file, f"{n}.json"))
    for run, best in (("ada", 80), ("bob", 20)):
        judge(tmp_path / run, [best] * 10)
    result = imported(*files)
    assert (result["verdicts"]["first"]["n"], result["win_rate"]["rate"], result["scale"]) == (9, 1, None)
    agreement = result["agreement"]
    assert agreement["raters"]["alpha_scale"] is None
    assert agreement["raters"]["alpha_choice"] < 0.5
    assert (agreement["judge"]["same"], agreement["judge"]["spearman_scale"]) == (1, None)
    assert {tuple(item["reasons"]) for item in result["items"]} == {("clearer",)}
    assert main(["ab", "--import", *map(str, files)]) == 0
    said = capsys.readouterr().out
    assert "scale of 1 to 5" not in said
    text = report(ReportOptions(run=tmp_path / "ada")).read_text(encoding="utf-8")
    assert "Eve, Max, Zoe rated 9 of 9 questions" in text
    assert "Scale of 1 to 5" not in text


def test_people_are_held_against_the_judge(tmp_path: Path) -> None:
    page = made_page(tmp_path)
    first, second = tmp_path / "ada", tmp_path / "bob"
    ratings = exported(tmp_path, rated(page, "Eve", says("ada")))
    assert "fastft score" in imported(ratings)["agreement"]["judge"]["reason"]
    judge(first, [None, *[80] * 9])
    judge(second, [50, *[20] * 6, 90, 90, None])
    found = imported(ratings)["agreement"]["judge"]
    assert (found["n"], found["same"]) == (8, 0.75)
    assert found["spearman_scale"] > 0
    write_run(second, entries("bob"))
    judge(second, [None] * 10)
    assert "no judge's score" in imported(ratings)["agreement"]["judge"]["reason"]


def test_scores_of_two_judges_are_not_held_against_each_other(tmp_path: Path) -> None:
    page = made_page(tmp_path)
    ratings = exported(tmp_path, rated(page, "Eve", says("ada")))
    for run, model in ((tmp_path / "ada", "hard"), (tmp_path / "bob", "kind")):
        judge(run, [50] * 10)
        held = json.loads((run / "scores.json").read_text())
        held["summary"]["judge"] = {"model": model}
        (run / "scores.json").write_text(json.dumps(held))
    assert "other judges" in imported(ratings)["agreement"]["judge"]["reason"]


def test_scores_of_other_responses_are_no_judge(tmp_path: Path) -> None:
    page = made_page(tmp_path)
    ratings = exported(tmp_path, rated(page, "Eve", says("ada")))
    for run in (tmp_path / "ada", tmp_path / "bob"):
        judge(run, [50] * 10)
    held = json.loads((tmp_path / "ada" / "scores.json").read_text())
    held["summary"]["responses_sha256"] = "0"
    (tmp_path / "ada" / "scores.json").write_text(json.dumps(held))
    assert "scores other responses" in imported(ratings)["agreement"]["judge"]["reason"]


def test_the_command_line_and_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = two_runs(tmp_path)
    assert main(["ab", str(first), str(second), "--limit", "5"]) == 0
    page = Path(capsys.readouterr().out.strip())
    one = exported(tmp_path, rated(page, "Eve", says("ada")), "1.json")
    other = exported(tmp_path, rated(page, "Max", says("ada")), "2.json")
    assert main(["ab", "--import", str(one), str(other)]) == 0
    said = capsys.readouterr().out
    assert "ada is better" in said
    assert "wins 5 of 5 decided questions: 100.0%" in said
    assert "Eve and Max: the same choice in 100.0% of 5" in said
    assert said.splitlines()[-1] == str(first / "ab.json")
    text = report(ReportOptions(run=first)).read_text(encoding="utf-8")
    assert "Eve, Max rated 5 of 5 questions" in text


def test_two_decodings_of_one_run_are_rated_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the scores of these names beside, files of their own, and in the report of the name alone."""
    run, other = two_runs(tmp_path)
    (run / "responses.t1.0.json").write_text(json.dumps(entries("bob")))
    (other / "responses.t1.0.json").write_text(json.dumps(entries("ada")))
    page = make_page(AbOptions(run, run, name=["test", "t1.0"]))
    assert page == run / "ab.test-t1.0.html"
    path, result = import_ratings(AbOptions(import_=[exported(tmp_path, rated(page, "Eve", says("ada")))]))
    assert path == run / "ab.test-t1.0.json"
    assert list(result["names"].values()) == ["ada (test)", "ada (t1.0)"]
    assert result["win_rate"]["rate"] == 1
    assert result["agreement"]["judge"]["reason"].startswith(f"{run / 'scores.json'} does not exist")
    page = make_page(AbOptions(run, other, name="t1.0"))
    path, result = import_ratings(AbOptions(import_=[exported(tmp_path, rated(page, "Eve", says("ada")))]))
    assert (path, result["win_rate"]["rate"]) == (run / "ab.t1.0.json", 0)
    assert result["agreement"]["judge"]["reason"].endswith(f"fastft score --run {run} --name t1.0")
    assert "Eve rated 9 of 9" in report(ReportOptions(run=run, name="t1.0")).read_text(encoding="utf-8")
    assert "Eve rated" not in report(ReportOptions(run=run)).read_text(encoding="utf-8")
    with pytest.raises(UserError, match="or two --name of one run's responses"):
        make_page(AbOptions(run, run, name="t1.0"))
    with pytest.raises(UserError, match="expected one name, or two"):
        AbOptions(run, other, name=["a", "b", "c"])
    assert main(["ab", str(run), str(run), "--name", "test", "greedy"]) == 2
    assert "responses.greedy.json does not exist" in " ".join(capsys.readouterr().err.split())


def test_runs_that_have_moved_are_named_again(tmp_path: Path) -> None:
    page = made_page(tmp_path)
    ratings = exported(tmp_path, rated(page, "Eve", says("ada")))
    moved = [(tmp_path / name).rename(tmp_path / f"{name}-2") for name in ("ada", "bob")]
    with pytest.raises(UserError, match="not here; say where they are"):
        import_ratings(AbOptions(import_=[ratings]))
    path, result = import_ratings(AbOptions(*moved, import_=[ratings]))
    assert path.parent == moved[0]
    assert result["win_rate"]["rate"] == 1
    with pytest.raises(UserError, match="rates other answers"):
        import_ratings(AbOptions(*moved[::-1], import_=[ratings]))
