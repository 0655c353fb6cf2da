"""Keywords are keywords, whatever lies beside the run under the same name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from small_records import made_records

from fastft.cli import main
from fastft.common.keywords import KEYWORDS, Option, hidden_path, is_keyword
from fastft.data.reading import data_path
from fastft.model.gpt2 import SIZES
from fastft.run.config import TrainOptions, changed_settings, from_yaml, to_yaml


@pytest.mark.parametrize(
    ("option", "word"), [("data", "sample"), ("data", "book"), ("weights", "gpt2"), ("weights", "none")]
)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_keyword_stays_one_beside_a_file_of_its_name(
    option: Option, word: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the options that a run is resumed with too, from this folder and from another one."""
    monkeypatch.chdir(tmp_path)
    options = TrainOptions(**{option: word}, model="pico")
    alone = to_yaml(options)
    assert hidden_path(option, word) is None
    (tmp_path / word).mkdir() if kind == "folder" else (tmp_path / word).write_text("[]")
    assert hidden_path(option, word) == (
        f"{word} means {KEYWORDS[option][word]}, not the {kind} here; for that give --{option} ./{word}"
    )
    assert to_yaml(options) == alone
    assert yaml.safe_load(alone)[option] == word
    saved = tmp_path / "config.yaml"
    saved.write_text(alone)
    assert changed_settings(from_yaml(saved), options) == []


def test_a_path_that_looks_like_a_keyword_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sample").mkdir()
    assert not is_keyword("data", "./sample")
    assert not is_keyword("data", Path("sample"))
    assert not is_keyword("weights", "none.pth")
    assert data_path("./sample") == Path("sample")
    assert data_path("sample") is None
    assert yaml.safe_load(to_yaml(TrainOptions(data="./sample")))["data"] == str(tmp_path / "sample")


def test_the_published_sizes_are_keywords() -> None:
    assert set(KEYWORDS["weights"]) == {"none", *(name for name in SIZES if name.startswith("gpt2"))}


def test_inspect_says_which_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sample").write_text(str(made_records(3)))
    assert main(["inspect", "--data", "sample"]) == 0
    said = "sample means the embedded records, not the file here; for that give --data ./sample"
    assert said in capsys.readouterr().out
