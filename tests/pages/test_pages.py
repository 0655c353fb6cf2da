"""The pages in headless Chromium, which `.ci/run` installs where it can; without one these tests are skipped."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rating_pages import WORDS, judge, made_page, page_data, two_runs, write_run

from fastft.reports.report import ReportOptions, report
from fastft.scores.ab import AbOptions
from fastft.scores.ratings import import_ratings
from fastft.scores.score import ScoreOptions, score

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

FLAGS = [
    "--no-sandbox",  # as root there is none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE = {"width": 390, "height": 780}
DESK = {"width": 1200, "height": 860}
LIGHT, DARK = "rgb(255, 255, 255)", "rgb(21, 24, 28)"


def chromium() -> str | None:
    """The browser to drive: `FASTFT_CHROMIUM`, or the first one on the path."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("FASTFT_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@dataclass
class Tab:
    """A page of the browser, and what it did that it must not."""

    page: Page
    problems: list[str] = field(default_factory=list)
    asked_for: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", lambda message: self.problems.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.asked_for.append(request.url))

    def open(self, path: Path) -> Page:
        self.page.goto(path.as_uri())
        return self.page

    def keys(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def background(self) -> str:
        return str(self.page.evaluate("getComputedStyle(document.body).backgroundColor"))

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    executable = chromium()
    if executable is None:
        pytest.skip("there is no Chromium: apt-get install chromium, or name one in FASTFT_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=FLAGS)  # in a new folder of its own
        yield opened
        opened.close()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    """A tab that remembers nothing; every test is also one that nothing was asked for and nothing complained of."""
    page = browser.new_page(viewport=DESK)
    page.set_default_timeout(30_000)
    opened = Tab(page)
    yield opened
    page.close()
    assert opened.problems == []
    assert [url for url in opened.asked_for if not url.startswith(("file:", "blob:file:"))] == []
    assert len({url for url in opened.asked_for if url.startswith("file:")}) == 1


@pytest.fixture(scope="module")
def report_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on two runs with everything in it."""
    first, second = two_runs(tmp_path_factory.mktemp("report"), 40)
    for run, scores in ((first, range(40)), (second, range(60, 100))):
        (run / "config.yaml").write_text("# fastft 1, torch 2\nmodel: nano\nseed: 123\n")
        lines = [
            {"step": step, "loss": 9 / step, "lr": 1e-3, "grad_norm": 1.0, "seconds": 0.5, "tokens_padded": 100,
             "tokens_real": 60, "tokens_computed": 40, "tokens_supervised": 20}
            for step in range(1, 9)
        ]  # fmt: skip
        lines += [{"step": 8, "val_loss": 1.5, "eval_seconds": 0.5}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        judge(run, list(scores))
    return report(ReportOptions(run=first, against=[second]))


def start(tab: Tab, page: Path, rater: str = "Eve") -> None:
    tab.open(page)
    tab.page.keyboard.type(rater)  # the field has the focus
    tab.keys("Enter")


def export(tab: Tab, folder: Path) -> tuple[Path, dict[str, Any]]:
    with tab.page.expect_download() as download:
        tab.keys("e")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path, json.loads(path.read_text(encoding="utf-8"))


# --- The rating page ---


def test_one_key_answers_a_question_through_to_the_import(tab: Tab, tmp_path: Path) -> None:
    page = made_page(tmp_path)
    items = page_data(page)["items"]
    start(tab, page)
    for place, item in enumerate(items):
        assert tab.text("#place") == f"{place + 1} of {len(items)}"
        assert tab.text("#text-a") == item["a"]
        first_is_a = item["a"].startswith("ada")
        keys = ("a", "b") if place % 2 else ("ArrowLeft", "ArrowRight")
        tab.keys("t" if place == 4 else keys[0] if first_is_a else keys[1])
    assert "All questions are rated" in tab.text("#done")
    path, file = export(tab, tmp_path)
    assert [row["item"] for row in file["ratings"]] == [item["item"] for item in items]
    assert all(row["scale_a"] is None for row in file["ratings"])
    _, result = import_ratings(AbOptions(import_=[path]))
    assert (result["verdicts"]["first"]["n"], result["verdicts"]["tie"]["n"]) == (len(items) - 1, 1)
    assert result["scale"] is None


def test_a_key_held_down_or_a_double_click_answers_one_question(tab: Tab, tmp_path: Path) -> None:
    start(tab, made_page(tmp_path))
    for _ in range(3):
        tab.page.keyboard.down("a")  # each but the first is a repetition
    assert tab.text("#place") == "2 of 9"
    tab.page.keyboard.up("a")
    assert "Question 1: A is better." in tab.text("#status")
    tab.page.dblclick("[data-choice=tie]")
    assert tab.text("#place") == "3 of 9"
    tab.keys("u")
    assert tab.text("#place") == "2 of 9"
    assert tab.page.locator("[aria-pressed=true]").count() == 0
    tab.keys("Backspace", "x")  # changes the first, and goes on
    assert tab.text("#place") == "2 of 9"
    _, file = export(tab, tmp_path)
    assert [row["choice"] for row in file["ratings"]] == ["both_bad"]


def test_a_reason_is_asked_for_and_summed_up(tab: Tab, tmp_path: Path) -> None:
    page = made_page(tmp_path, reason=True)
    start(tab, page)
    tab.keys("b")
    assert tab.text("#place") == "1 of 9"  # the reason is still to come, and has the keys
    tab.page.keyboard.type("at best a better one")
    tab.keys("Enter")
    assert tab.text("#place") == "2 of 9"
    assert tab.page.input_value("#reason") == ""
    tab.keys("t", "Enter")  # which may be none
    start(tab, page)  # both are kept
    assert tab.text("#place") == "3 of 9"
    path, file = export(tab, tmp_path)
    assert [row["reason"] for row in file["ratings"]] == ["at best a better one", ""]
    _, result = import_ratings(AbOptions(import_=[path]))
    assert sorted(item["reasons"] for item in result["items"]) == [[], ["at best a better one"]]


def test_with_scale_and_reason_the_keys_go_to_what_is_still_to_say(tab: Tab, tmp_path: Path) -> None:
    start(tab, made_page(tmp_path, scale=True, reason=True))
    tab.keys("a", "4", "2")
    tab.page.keyboard.type("5 of 5")
    tab.keys("Enter")
    assert tab.text("#place") == "2 of 9"
    _, file = export(tab, tmp_path)
    (row,) = file["ratings"]
    assert (row["choice"], row["scale_a"], row["scale_b"], row["reason"]) == ("a", 4, 2, "5 of 5")


@pytest.mark.parametrize("options", [{}, {"scale": True, "reason": True}])
@pytest.mark.parametrize("touch", [False, True])
def test_the_rating_page_fits_a_phone(touch: bool, options: Any, browser: Browser, tmp_path: Path) -> None:
    page = browser.new_page(viewport=PHONE, has_touch=touch, is_mobile=touch)
    tab = Tab(page)
    start(tab, made_page(tmp_path, **options))
    assert tab.overflow() == 0
    for control in page.locator(".panel button").all():
        box = control.bounding_box()
        assert box is not None
        assert 0 <= box["x"] < box["x"] + box["width"] <= PHONE["width"]
        assert box["y"] + box["height"] <= PHONE["height"]
    choice = page.locator("[data-choice=both_bad]")
    if touch:
        choice.tap()
    else:
        choice.click()
    assert tab.text("#place") == ("1 of 9" if options else "2 of 9")
    page.close()
    assert tab.problems == []


def test_rating_with_the_scale_by_keys_alone_through_to_the_import(tab: Tab, tmp_path: Path) -> None:
    page = made_page(tmp_path, scale=True)
    items = page_data(page)["items"]
    start(tab, page)
    for place, item in enumerate(items):
        assert tab.text("#place") == f"{place + 1} of {len(items)}"
        assert tab.text("#instruction") == item["instruction"]
        assert tab.text("#text-a") == item["a"]
        first_is_a = item["a"].startswith("ada")
        tab.keys("a" if first_is_a else "b", *(("4", "1") if first_is_a else ("1", "4")), "Enter")
    assert "All questions are rated" in tab.text("#done")
    path, file = export(tab, tmp_path)
    assert path.name == f"ratings-Eve-{file['page'][:8]}.json"
    assert [row["item"] for row in file["ratings"]] == [item["item"] for item in items]
    assert all(row["seconds"] >= 0 and row["time"].endswith("Z") for row in file["ratings"])
    _, result = import_ratings(AbOptions(import_=[path]))
    assert result["verdicts"]["first"]["n"] == result["n_rated"] == len(items)
    assert (result["scale"]["first"]["mean"], result["scale"]["second"]["mean"]) == (4, 1)
    assert result["raters"][0]["name"] == "Eve"


def test_nothing_of_the_runs_is_seen_while_rating(tab: Tab, tmp_path: Path) -> None:
    start(tab, made_page(tmp_path))
    shown = tab.text("body").replace(tab.text("#text-a"), "").replace(tab.text("#text-b"), "")
    assert "ada" not in shown
    assert "bob" not in shown
    assert "123" not in shown


def test_what_is_entered_is_kept_and_each_rater_has_their_own(tab: Tab, tmp_path: Path) -> None:
    page = made_page(tmp_path, scale=True)
    start(tab, page)
    tab.keys("t", "3", "3", "Enter", "x", "1")  # the second is not done
    start(tab, page, "Max")
    assert tab.text("#place") == "1 of 9"
    tab.open(page)
    assert tab.page.input_value("#name") == "Max"  # who was here last
    start(tab, page)
    assert tab.text("#place") == "2 of 9"
    assert "Welcome back: 1 of 9" in tab.text("#status")
    assert tab.page.locator("[data-choice=both_bad][aria-pressed=true]").is_visible()
    assert tab.page.is_checked("input[name=scale_a][value='1']")
    _, file = export(tab, tmp_path)
    assert [row["choice"] for row in file["ratings"]] == ["tie"]
    other = made_page(tmp_path, scale=True, seed=9)  # over the same file: another page, and so nothing rated
    start(tab, other)
    assert tab.text("#place") == "1 of 9"


def test_undo_back_and_skip(tab: Tab, tmp_path: Path) -> None:
    start(tab, made_page(tmp_path, scale=True))
    checked = "input:checked, [aria-pressed=true]"
    tab.keys("Enter")
    assert "Still to say: which is better, how good A is, how good B is" in tab.text("#status")
    tab.keys("a", "5", "2", "Enter", "b", "4")
    assert tab.page.locator(checked).count() == 2
    tab.keys("u")
    assert tab.page.locator(checked).count() == 1
    tab.keys("u", "u")  # back into the first question, whose last entry goes
    assert tab.text("#place") == "1 of 9"
    assert tab.page.locator(checked).count() == 2
    tab.keys("u", "u", "u")
    assert tab.page.locator(checked).count() == 0
    assert tab.page.is_disabled("#undo")
    tab.keys("s", "s")
    assert tab.text("#place") == "3 of 9"
    tab.keys("Backspace")
    assert tab.text("#place") == "2 of 9"
    for _ in range(7):
        tab.keys("s")
    assert tab.text("#place") == "9 of 9"
    tab.keys("s")  # what was skipped comes again
    assert tab.text("#place") == "1 of 9"


def test_arrows_mark_an_answer_and_the_reference_is_behind_a_key(tab: Tab, tmp_path: Path) -> None:
    page = made_page(tmp_path, scale=True)
    start(tab, page)
    tab.keys("ArrowRight", "2")
    assert tab.page.is_checked("input[name=scale_b][value='2']")
    assert not tab.page.is_visible("#reference-text")
    tab.keys("r")
    assert tab.text("#reference-text") == page_data(page)["items"][0]["reference"]
    tab.keys("a", "ArrowLeft", "2")
    assert tab.text("#status") == ""
    tab.keys("ArrowLeft", "1")
    assert "You prefer A, and rate it lower" in tab.text("#status")


def test_rating_by_touch_on_a_phone(tab: Tab, tmp_path: Path) -> None:
    tab.page.set_viewport_size(PHONE)
    start(tab, made_page(tmp_path, scale=True))
    assert tab.overflow() == 0
    tab.page.click("[data-choice=b]")
    for name, value in (("scale_a", "2"), ("scale_b", "5")):
        tab.page.locator(f"label:has(input[name={name}][value='{value}'])").click()
    tab.page.click("#next")
    assert tab.text("#place") == "2 of 9"
    assert "1 rated" in tab.text("#who")


def test_every_control_has_a_name(tab: Tab, tmp_path: Path) -> None:
    start(tab, made_page(tmp_path, scale=True))
    tree = tab.page.locator("body").aria_snapshot()
    for named in ('group "How good is A?"', 'group "Which answer is better?"', 'button "A is better A"', 'radio "5"'):
        assert named in tree
    assert 'progressbar "Rated"' in tree
    assert tab.page.evaluate("document.activeElement.id") == "instruction"  # read out at each new question


# --- The report ---


ROWS = "#all-responses > tbody > tr"


def test_the_search_box_filters(tab: Tab, report_page: Path) -> None:
    page = tab.open(report_page)
    rows = page.locator(ROWS)
    assert rows.count() == 20
    assert tab.text("#found") == "40 responses"
    tab.keys("/")
    page.keyboard.type("SEVEN ada")
    expect(rows, 4)
    assert tab.text("#found") == "4 of 40"
    page.fill("#search", "no such words")
    expect(rows, 0)
    assert page.is_visible("#nothing")
    page.press("#search", "Escape")
    expect(rows, 20)


def expect(rows: Locator, n: int) -> None:
    """Waits for so many rows: a search waits for the next letter."""
    from playwright.sync_api import expect as expected

    expected(rows).to_have_count(n)


def numbers(tab: Tab) -> list[int]:
    """The rows of responses.json that are shown, in their order."""
    return [int(text) for text in tab.page.locator(f"{ROWS} > td:first-child").all_inner_texts()]


def test_responses_are_paged(tab: Tab, report_page: Path) -> None:
    page = tab.open(report_page)
    assert numbers(tab) == list(range(1, 21))
    page.click(".pager [data-to=next]")
    assert numbers(tab) == list(range(21, 41))
    assert tab.text(".pager .place") == "21 to 40 of 40"
    assert page.is_disabled(".pager [data-to=next]")
    page.select_option("#size", "5")
    assert numbers(tab) == [1, 2, 3, 4, 5]
    page.click(".pager [data-to=last]")
    assert numbers(tab) == [36, 37, 38, 39, 40]


def test_responses_are_sorted_and_filtered_by_what_went_wrong(tab: Tab, tmp_path: Path) -> None:
    answers = [
        ("a", "owl", "owl"), ("b", "owl", "an owl, I think"), ("a", "owl", ""), ("b", "owl", "so it is " * 9),
        ("a", "owl", "cat"),
    ]  # fmt: skip
    run = write_run(
        tmp_path / "run",
        [
            {"instruction": "Who?", "input": "", "output": output, "model_response": response, "category": category}
            for category, output, response in answers
        ],
    )
    judge(run, [100, 70, 0, None, 30])
    page = tab.open(report(ReportOptions(run=run)))
    for order, rows in (
        ("worst", [3, 5, 2, 1, 4]), ("best", [1, 2, 5, 3, 4]), ("category", [1, 3, 5, 2, 4]),
        ("shortest", [3, 1, 5, 2, 4]), ("longest", [4, 2, 1, 5, 3]), ("file", [1, 2, 3, 4, 5]),
    ):  # fmt: skip
        page.select_option("#sort", order)
        assert numbers(tab) == rows, order
    for wrong, rows in (
        ("not the reference’s text (4)", [2, 3, 4, 5]), ("judge’s score below 50 (2)", [3, 5]), ("empty (1)", [3]),
        ("loops (1)", [4]), ("no score by the judge (1)", [4]), ("exact match (1)", [1]),
        ("Everything", [1, 2, 3, 4, 5]),
    ):  # fmt: skip
        page.select_option("#wrong", label=wrong)
        assert numbers(tab) == rows, wrong
    page.select_option("#category", label="b")
    page.select_option("#wrong", label="loops (1)")
    assert numbers(tab) == [4]


EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Responses as foreign data may hold them: markup, right-to-left text, one endless word, a thousand lines."""
    texts = [
        EVIL,
        "\u202eمرحبا بالعالم (right-to-left) אבג",
        "x" * 6_000,
        "line\n" * 1000,
        "{{ 7 * 7 }} </script> <!--",
        "\ud83d",
    ]
    entries = [
        {"instruction": text, "input": text, "output": text, "model_response": text + "!", "category": text[:2000]}
        for text in texts * 2
    ]
    runs = [write_run(tmp_path_factory.mktemp("hostile") / f"run{n}" / ("long-name-" * 8), entries) for n in range(3)]
    for run in runs:
        score(ScoreOptions(run=run, judge="none"))
    return report(ReportOptions(run=runs[0], against=runs[1:]))


@pytest.mark.parametrize("touch", [False, True])
@pytest.mark.parametrize("which", ["report_page", "hostile_report"])
def test_a_report_on_a_phone_fits_and_is_no_endless_page(
    touch: bool, which: str, browser: Browser, request: pytest.FixtureRequest
) -> None:
    page = browser.new_page(viewport=PHONE, has_touch=touch, is_mobile=touch)
    tab = Tab(page)
    tab.open(request.getfixturevalue(which))
    assert tab.overflow() == 0
    assert page.evaluate("document.documentElement.scrollHeight") <= 12_000
    page.close()
    assert tab.problems == []


def test_hostile_texts_stay_texts(tab: Tab, hostile_report: Path) -> None:
    page = tab.open(hostile_report)
    tab.page.select_option("#size", "50")
    assert page.locator("img").count() == 0
    assert tab.text(f"{ROWS} >> nth=0 >> td >> nth=2").strip() == EVIL
    assert tab.overflow() == 0
    huge = page.locator(f"{ROWS} >> nth=2 >> td >> nth=2")
    assert len(huge.inner_text()) < 1000
    huge.locator("button").click()
    assert huge.inner_text() == "x" * 6_000
    arabic = page.locator(f"{ROWS} >> nth=1 >> td >> nth=2 >> .text")
    assert arabic.evaluate("one => getComputedStyle(one).unicodeBidi") == "plaintext"
    assert "49" not in tab.text(f"{ROWS} >> nth=4")


def test_tables_tell_that_they_scroll(tab: Tab, tmp_path: Path) -> None:
    runs = [tmp_path / f"run-{n}" for n in range(7)]
    for run in runs:
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "tokens_padded": 123456789}\n')
    page = tab.open(report(ReportOptions(run=runs[0], against=runs[1:])))
    assert page.locator("#comparison .wide.scrolls").count() == 0
    page.set_viewport_size(PHONE)
    box = page.locator("#comparison .wide").first
    page.wait_for_selector("#comparison .wide.more-right")
    assert "scrolls sideways" in box.evaluate("one => getComputedStyle(one, '::before').content")
    assert box.evaluate("one => one.tabIndex") == 0
    box.evaluate("one => { one.scrollLeft = one.scrollWidth; }")
    page.wait_for_selector("#comparison .wide.more-left:not(.more-right)")


@pytest.mark.parametrize("window", [DESK, {"width": 1280, "height": 860}, PHONE])
def test_the_contents_stay_in_sight_and_follow(tab: Tab, report_page: Path, window: Any) -> None:
    tab.page.set_viewport_size(window)
    page = tab.open(report_page)
    for section in ("responses", "training"):
        page.evaluate("id => document.getElementById(id).scrollIntoView({ behavior: 'instant' })", section)
        page.wait_for_selector(f"nav.contents a[href='#{section}'][aria-current]")
        box = page.locator("nav.contents").bounding_box()
        assert box is not None
        assert 0 <= box["y"] < 120
        assert page.locator("nav.contents [aria-current]").count() == 1


@pytest.mark.long
def test_a_report_of_ten_thousand_responses_opens_at_once_and_is_searched(browser: Browser, tmp_path: Path) -> None:
    n = 10_000
    run = write_run(tmp_path / "run", [
        {"instruction": f"Explain the number {row} to a child, with an example.", "input": "", "model_response":
         f"The number {row} is {WORDS[row % 10]} more than {row - row % 10}. " * 4, "output": f"Number {row}. " * 12}
        for row in range(n)
    ])  # fmt: skip
    judge(run, [row % 101 for row in range(n)])
    path = report(ReportOptions(run=run))
    opened = []
    for _ in range(3):  # another process on the machine makes a wall's second longer
        page = browser.new_page(viewport=DESK)
        began = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector(ROWS)
        opened.append(time.perf_counter() - began)
        assert page.locator(ROWS).count() == 20
        page.fill("#search", "number 7777 is")
        page.wait_for_selector("#found:text-is('1 of 10,000')")
        assert page.locator(ROWS).count() == 1
        page.close()
    assert min(opened) < 2


def test_the_report_shows_both_runs(tab: Tab, report_page: Path) -> None:
    tab.open(report_page)
    assert "bob less ada" in tab.text("#comparison")
    assert "+60.00" in tab.text("#comparison")
    assert tab.page.locator(".charts svg").count() == 4
    assert tab.page.locator(".bars i").count() == 20


def least_contrast(tab: Tab) -> float:
    """WCAG's contrast of the least legible text colour of a page on its background."""
    return float(
        tab.page.evaluate("""() => {
          const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          const light = (colour) => {
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
              .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const page = light(getComputedStyle(document.body).backgroundColor);
          const texts = [...document.querySelectorAll("body *")].filter((one) =>
            one.checkVisibility() && !one.closest(":checked + span, .primary, :disabled, [aria-pressed=true]")
            && [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
          return Math.min(...texts.map((one) => {
            const style = getComputedStyle(one);
            const ink = light(one.closest("svg") ? style.fill : style.color);
            return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
          }));
        }""")
    )


@pytest.mark.parametrize("which", ["report", "ab"])
def test_light_and_dark(which: str, tab: Tab, report_page: Path, tmp_path: Path) -> None:
    if which == "report":
        tab.open(report_page)
    else:
        start(tab, made_page(tmp_path))
    for scheme, background in (("light", LIGHT), ("dark", DARK)):
        tab.page.emulate_media(color_scheme=scheme)
        assert tab.background() == background
        assert least_contrast(tab) >= 4.5
    tab.page.click("#theme")  # from what the system says to light, whatever it says
    assert tab.background() == LIGHT
    tab.page.click("#theme")
    tab.page.emulate_media(color_scheme="light")
    assert tab.background() == DARK
    tab.page.reload()
    assert tab.background() == DARK
    tab.page.emulate_media(color_scheme="light", media="print")  # paper is white
    assert tab.background() == LIGHT


def test_the_report_prints(tab: Tab, report_page: Path) -> None:
    tab.open(report_page)
    paper = tab.page.pdf(format="A4")
    pages = paper.count(b"/Type /Page\n") or paper.count(b"/Type /Page ")
    assert paper.startswith(b"%PDF")
    assert 3 <= pages <= 12
    assert tab.page.evaluate("document.querySelector('#configuration details').open")


@pytest.mark.parametrize("window", [DESK, PHONE], ids=["desk", "phone"])
def test_conversations_open_turn_by_turn(window: Any, tab: Tab, tmp_path: Path) -> None:
    """Their lines say the scores of both runs; opened, one shows what was said, as text, and nothing is wider than the
    window. Those behind the first 30 are behind one more click."""
    said = "<b>no markup</b> " + "wide" * 80
    talks = [
        {"id": n, "category": "sums", "turns": [{"question": f"Twice {n}?", "answer": said}] * 2} for n in range(33)
    ]
    runs = [tmp_path / name for name in ("ada", "bob")]
    for run in runs:
        run.mkdir()
        (run / "conversations.json").write_text(json.dumps(talks))
        score(ScoreOptions(run=run, judge="none"))
        scores = json.loads((run / "scores.json").read_text())
        for talk in scores["conversations"]:
            talk["turns"][0] |= {"score": 70, "raw": '{"reason": "It is <i>so</i>.", "score": 70}', "reason": None}
        (run / "scores.json").write_text(json.dumps(scores))
    page = tab.open(report(ReportOptions(run=runs[0], against=[runs[1]])))
    page.set_viewport_size(window)
    assert page.locator("details.talk").count() == 33
    assert page.locator("details.talk").nth(32).is_hidden()
    first = page.locator("details.talk").first
    assert "ada 70 · –" in " ".join(first.inner_text().split())
    first.locator("summary").click()
    assert first.locator(".asked").count() == 2
    assert "<b>no markup</b>" in first.inner_text()
    assert first.inner_text().count("It is <i>so</i>.") == 2
    page.locator("details.rest > summary").click()
    assert page.locator("details.talk").nth(32).is_visible()
    assert tab.overflow() <= 0
