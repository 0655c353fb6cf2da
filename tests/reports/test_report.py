from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastft.common.errors import UserError
from fastft.metrics.text_metrics import accuracy
from fastft.reports.report import ReportOptions, report
from fastft.scores.score import ScoreOptions, score

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\""
ENTRIES = [
    {"instruction": "Name the plural.", "input": "goose", "output": "Geese it is.", "model_response": "Geese it is."},
    {"instruction": EVIL, "input": EVIL, "output": EVIL, "model_response": EVIL + "!", "category": EVIL},
    {"instruction": "Say nothing.", "input": "", "output": "Something.", "model_response": ""},
]
STEPS: list[dict[str, Any]] = [
    {"step": step, "loss": 4.0 / step, "lr": 1e-4 * step, "grad_norm": 1.0, "seconds": 0.5,
     "tokens_padded": 1000, "tokens_real": 600, "tokens_computed": 400, "tokens_supervised": 200}
    for step in range(1, 5)
]  # fmt: skip


class Page(HTMLParser):
    """The elements, the text, and the ids of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and self.cdata_elem:
            self.scripts += [data] if self.cdata_elem == "script" else []
        else:
            self.text += data + " "  # cells that touch in the source stand apart on the page

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def squeezed(self) -> str:
        return " ".join(self.text.split())


def write_metrics(run: Path, *lines: Any) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_responses(run: Path, entries: Any = ENTRIES) -> None:
    (run / "responses.json").write_text(json.dumps(entries), encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, whose names are as hostile as its texts."""
    run = tmp_path_factory.mktemp("run") / "<b>a&b"
    run.mkdir()
    (run / "config.yaml").write_text(f"seed: 123\noptim:\n  lr: 5.0e-05\nnote: {json.dumps(EVIL)}\n", encoding="utf-8")
    write_metrics(run, *STEPS, {"step": 2, "val_loss": 3.0}, {"step": 4, "val_loss": 2.5}, {"event": "sample"})
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "loss": 0.1, "tokens_pad')
    write_responses(run)
    score(ScoreOptions(run=run, judge="none"))
    scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    scores["judgements"][0].update(score=97, raw="97", reason=None)
    scores["judgements"][1].update(raw=EVIL, reason="not an integer: " + EVIL)
    scores["summary"].update(judge_mean=48.25, n_scored=1, n_unscored=2)
    (run / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    (run / "demo.json").write_text('{"exact_match_before": 1.5}', encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    path = report(ReportOptions(run=run))
    assert path == run / "report.html"
    return Page(path)


def test_no_text_of_a_run_becomes_markup(page: Page) -> None:
    assert page.count("img") == 0
    assert len(page.scripts) == page.count("script") == 2
    assert not any(EVIL[8:20] in script for script in page.scripts)
    assert "&lt;b&gt;a&amp;b" in page.source
    assert "<b>a" not in page.source
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    # instruction, input, output, response, reply, reason, configuration, and twice the category
    assert page.text.count(EVIL) == 9


def test_the_page_needs_nothing_but_itself(page: Page) -> None:
    source = page.source.replace(EVIL, "")
    body = source.split("</head>")[1].split("<script>")[0]
    assert not re.search(r"https?:|//|@import|url\((?!#)", body)
    assert not re.search(r"https?:|@import|url\((?!#)|fetch|XMLHttp|import\(", source)
    assert page.count("link") == page.count("iframe") == 0
    references = {value for _, attributes in page.tags for name, value in attributes.items() if "href" in name}
    assert all(value is not None and value.startswith("#") for value in references)


def test_ids_are_unique_and_references_resolve(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", page.source)) <= set(ids)


def test_there_is_a_chart_of_each_kind_in_the_pages_own_colour(page: Page) -> None:
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert labels == ["loss against step", "learning rate against step", "gradient norm against step"]
    assert "currentColor" in page.source
    assert "var(--accent)" in page.source
    assert "#01020" not in page.source
    assert "training" in page.text
    assert "validation" in page.text
    assert "color-scheme: light dark" in page.source
    assert "@media print" in page.source


def test_tokens_are_summed_with_shares(page: Page) -> None:
    text = page.squeezed()
    for count, share in [("4,000", "100.0"), ("2,400", "60.0"), ("1,600", "40.0"), ("800", "20.0")]:
        assert re.search(rf" {count} {share} %", text), count
    assert "1,200 real tokens a second over 2.0 s" in text
    assert "skipped" not in text


def test_scores_and_configuration_are_shown(page: Page) -> None:
    text = page.squeezed()
    assert "Exact match, % 33.33 6.15 to 79.23 before training 1.50" in text
    assert "Judge’s mean 48.25" in text
    assert "No judge: --judge none" in text
    assert "optim.lr 5e-05" in text


def test_responses_stand_beside_their_judgements(page: Page) -> None:
    rows = page.source.split('id="all-responses"')[1].split("</table>")[0].split("<tr>")[2:]
    assert len(rows) == 3
    assert [("✓ exact match" in row) for row in rows] == [True, False, False]
    assert "Judge <b>97</b>" in rows[0]
    assert "not an integer" in rows[1]
    assert "empty" in rows[2]


def test_two_reports_of_a_run_are_the_same(run: Path, page: Page) -> None:
    assert report(ReportOptions(run=run)).read_text(encoding="utf-8") == page.source


@pytest.mark.parametrize(
    ("name", "command"),
    [("metrics.jsonl", "fastft train --out"), ("responses.json", "fastft generate --run"),
     ("scores.json", "fastft score --run"), ("config.yaml", "fastft train --out")],
)  # fmt: skip
def test_a_missing_file_is_told_with_the_command_that_makes_it(
    run: Path, page: Page, tmp_path: Path, name: str, command: str
) -> None:
    for path in run.iterdir():
        if path.name not in (name, "report.html"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    text = Page(report(ReportOptions(run=tmp_path))).squeezed()
    assert text.count(f"{command} {tmp_path}") > page.squeezed().count(f"{command} {run}")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "responses.json"])
def test_any_single_file_makes_a_report(run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes((run / name).read_bytes())
    assert report(ReportOptions(run=tmp_path)).is_file()


def test_scores_of_other_responses_are_not_shown_beside_these(run: Path, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_bytes((run / "scores.json").read_bytes())
    write_responses(tmp_path, ENTRIES[::-1])
    page = Page(report(ReportOptions(run=tmp_path)))
    assert "has changed since it was scored" in page.text
    assert "<b>97</b>" not in page.source
    (tmp_path / "responses.json").unlink()
    assert "which was scored, is gone" in Page(report(ReportOptions(run=tmp_path))).text


def scored_run(folder: Path, model: str, scores: list[int]) -> Path:
    """A run whose responses were scored by a judge."""
    folder.mkdir()
    write_responses(folder)
    score(ScoreOptions(run=folder, judge="none"))
    held = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    held["summary"].update(judge={"name": "ollama", "model": model}, judge_mean=sum(scores) / len(scores))
    for judgement, one in zip(held["judgements"], scores, strict=True):
        judgement["score"] = one
    (folder / "scores.json").write_text(json.dumps(held), encoding="utf-8")
    return folder


def test_scores_of_two_judges_are_not_compared(tmp_path: Path) -> None:
    first, alike, other = (
        scored_run(tmp_path / name, model, [value] * len(ENTRIES))
        for name, model, value in (("a", "llama3", 10), ("b", "llama3", 20), ("c", "tiny", 90))
    )
    page = Page(report(ReportOptions(run=first, against=[alike])))
    assert "other judges" not in page.text
    assert '<td class="n best">20.00</td>' in page.source
    assert json.loads((first / "report.json").read_text())["differences"][0]["judge"]["mean"] == 10
    page = Page(report(ReportOptions(run=first, against=[other])))
    assert "scores are not compared: the two runs were scored by other judges" in page.squeezed()
    assert '<td class="n best">90.00</td>' not in page.source
    assert json.loads((first / "report.json").read_text())["differences"][0]["judge"] is None


def test_scores_of_other_responses_are_left_out_of_the_comparison(tmp_path: Path) -> None:
    first, second = (scored_run(tmp_path / name, "llama3", [70] * len(ENTRIES)) for name in ("a", "b"))
    held = json.loads((second / "scores.json").read_text())
    held["summary"].update(judge_mean=99.25)
    (second / "scores.json").write_text(json.dumps(held))
    assert "99.25" in Page(report(ReportOptions(run=first, against=[second]))).text
    write_responses(second, ENTRIES[::-1])
    page = Page(report(ReportOptions(run=first, against=[second])))
    assert "The scores of b are left out: responses.json has changed since it was scored" in page.squeezed()
    assert "99.25" not in page.text


def test_what_is_undefined_is_a_dash_on_the_page_and_in_no_ranking(tmp_path: Path) -> None:
    """An emoji has no word for ROUGE; beside it two answers that have one."""
    texts = [("👍", "👍"), ("an owl", "an owl"), ("a cat", "an owl")]
    entries = [
        {"instruction": f"Say {n}.", "input": "", "output": b, "model_response": a} for n, (a, b) in enumerate(texts)
    ]
    write_responses(tmp_path, entries)
    score(ScoreOptions(run=tmp_path, judge="none"))
    page = Page(report(ReportOptions(run=tmp_path)))
    assert re.search(r"ROUGE-L – ✓ exact match", page.squeezed())
    assert "ROUGE-L F1, % 50.00" in page.squeezed()
    assert "1 left out" in page.squeezed()
    held = json.loads((tmp_path / "report.json").read_text())["runs"][0]
    assert [answer["rouge_l"] for answer in held["answers"]] == [None, 100, 0]
    assert (held["best"], held["worst"]) == ([2], [3])
    assert sum(held["histograms"]["rouge_l"]) == 2


def test_entries_that_generate_left_out_are_in_no_figure_of_the_page(tmp_path: Path) -> None:
    why = "its prompt fills the context of 256 tokens"
    entries = [
        {"instruction": f"Say {word}.", "input": "", "output": word, "model_response": word}
        for word in ("one", "two", "three", "four")
    ]
    left_out = [*entries[:2], *({**entry, "model_response": "", "left_out": why} for entry in entries[2:])]
    for name, answers in (("whole", entries), ("part", left_out)):
        (tmp_path / name).mkdir()
        write_responses(tmp_path / name, answers)
        score(ScoreOptions(run=tmp_path / name, judge="none"))
    page = Page(report(ReportOptions(run=tmp_path / "part", against=[tmp_path / "whole"])))
    said = page.squeezed()
    assert "2 more entries are in no figure, since fastft generate left them without a response: # 3, 4." in said
    assert "2 more questions are left out, to which one of the two has no response" in said
    assert said.count(f"left out {why}") == 2
    assert "empty" not in said
    numbers = json.loads((tmp_path / "part" / "report.json").read_text())
    part, whole = numbers["runs"]
    assert (part["scores"]["n"], part["scores"]["exact_match"]) == (2, 100)
    assert (sum(part["histograms"]["rouge_l"]), sum(whole["histograms"]["rouge_l"])) == (2, 4)
    assert part["intervals"]["exact_match"] != whole["intervals"]["exact_match"]
    assert not {3, 4} & {*part["best"], *part["worst"]}
    assert [answer.get("left_out") for answer in part["answers"]] == [None, None, why, why]
    assert (numbers["differences"][0]["n"], numbers["differences"][0]["n_left_out"]) == (2, 2)
    assert numbers["differences"][0]["exact_match"]["mean"] == 0


def test_a_run_of_which_rouge_says_nothing_has_dashes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        entries = [{"instruction": f"{n}", "input": "", "output": "👍", "model_response": "👍"} for n in range(2)]
        write_responses(tmp_path / name, entries)
        score(ScoreOptions(run=tmp_path / name, judge="none"))
    text = Page(report(ReportOptions(run=tmp_path / "a", against=[tmp_path / "b"]))).squeezed()
    assert re.search(r"ROUGE-1 F1, % – – ROUGE-2 F1, % – – ROUGE-L F1, % – –", text)
    assert "How the responses score" not in text
    assert "Answers to look at first" not in text


def test_the_page_says_where_scores_were_read(tmp_path: Path) -> None:
    run = scored_run(tmp_path / "a", "llama3", [70] * len(ENTRIES))
    held = json.loads((run / "scores.json").read_text())
    held["summary"]["judge_rungs"] = {"integer": 2, "asked again: json": 1}
    (run / "scores.json").write_text(json.dumps(held))
    text = Page(report(ReportOptions(run=run))).squeezed()
    assert "Read from: a bare integer 2, JSON when asked again 1." in text


def test_the_likeliest_choices_are_shown(tmp_path: Path) -> None:
    run = scored_run(tmp_path / "a", "llama3", [70] * len(ENTRIES))
    held = json.loads((run / "scores.json").read_text())
    held["summary"]["choices_by_likelihood"] = {
        "total": accuracy([True, False, False]), "per_token": accuracy([True, True, False]), "by_category": {},
    }  # fmt: skip
    (run / "scores.json").write_text(json.dumps(held))
    text = Page(report(ReportOptions(run=run))).squeezed()
    assert re.search(r"by likelihood, % 33\.33 .*by likelihood a token, % 66\.67", text)


def test_a_step_written_twice_counts_once_and_odd_values_do_no_harm(tmp_path: Path) -> None:
    write_metrics(
        tmp_path,
        {**STEPS[0], "tokens_padded": 5},
        STEPS[0],
        {"step": 2, "loss": float("nan"), "lr": None, "grad_norm": "x", "tokens_padded": 500},
        {"step": 3, "loss": None, "skipped": True},
        {"step": 4, "loss": float("inf"), "skipped": True},
        {"step": 4, "event": "sample", "text": "x"},
        ["no", "object"],
        {"val_loss": 3},
    )
    text = Page(report(ReportOptions(run=tmp_path))).squeezed()
    assert re.search(r"computes them 1,500 100\.0 %", text)
    assert "2 steps were skipped" in text


def test_configuration_that_is_no_yaml_is_shown_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [<b>", encoding="utf-8")
    page = Page(report(ReportOptions(run=tmp_path)))
    assert "a: [<b>" in page.text


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path: Path) -> None:
    write_responses(tmp_path, [{**ENTRIES[0], "model_response": "half \ud83d"}])
    assert "half ?" in Page(report(ReportOptions(run=tmp_path))).text


def test_no_folder_and_an_empty_one_are_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run"):
        report(ReportOptions(run=tmp_path / "missing"))
    with pytest.raises(UserError, match="nothing to report"):
        report(ReportOptions(run=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["[]", '{"summary": 3, "judgements": []}', "{"])
def test_scores_of_another_make_are_the_users_mistake(tmp_path: Path, text: str) -> None:
    (tmp_path / "scores.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"scores\.json"):
        report(ReportOptions(run=tmp_path))


def test_a_failed_report_leaves_the_old_one(tmp_path: Path) -> None:
    write_responses(tmp_path)
    before = report(ReportOptions(run=tmp_path)).read_bytes()
    (tmp_path / "responses.json").write_text("[{}]", encoding="utf-8")
    with pytest.raises(UserError, match="row 1"):
        report(ReportOptions(run=tmp_path))
    assert (tmp_path / "report.html").read_bytes() == before
