"""Where exports lie, and that nobody else's file is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastft.common.errors import UserError
from fastft.export.places import new_files


def make(folder: Path, *names: str, overwrite: bool = False) -> None:
    with new_files(folder, overwrite=overwrite, made_of={"to": "hf"}) as new:
        for name in names:
            (new / name).write_text(f"new {name}")


def test_an_export_is_replaced_with_all_its_files_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "export" / "hf"
    make(folder, "a", "b")
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds an export; replace it with --overwrite"):
        make(folder, "b", "c")
    make(folder, "b", "c", overwrite=True)
    assert {path.name: path.read_text() for path in folder.iterdir() if path.name != "export.json"} == {
        "b": "new b", "c": "new c", "mine.txt": "mine",
    }  # fmt: skip
    said = json.loads((folder / "export.json").read_text())
    assert (said["to"], sorted(said["files"]), said["files"]["b"]["bytes"]) == ("hf", ["b", "c"], 5)
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]


def test_a_file_of_somebody_elses_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds files, and no export has written them"):
            make(tmp_path / "other", "a", overwrite=overwrite)
    make(tmp_path / "own", "a")
    (tmp_path / "own" / "b").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="own/b is there, and no export has written it"):
        make(tmp_path / "own", "a", "b", overwrite=True)
    assert (tmp_path / "own" / "a").read_text() == "new a"
    with pytest.raises(UserError, match="is no folder"):
        make(tmp_path / "other" / "a", "x", overwrite=True)
    assert (tmp_path / "other" / "a").read_text() == "mine"


def test_a_list_of_files_elsewhere_removes_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    make(tmp_path / "own", "a")
    said = json.loads((tmp_path / "own" / "export.json").read_text())
    said["files"]["../precious"] = {}
    (tmp_path / "own" / "export.json").write_text(json.dumps(said))
    make(tmp_path / "own", "b", overwrite=True)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "own" / "a").exists()


def test_what_fails_leaves_the_earlier_export(tmp_path: Path) -> None:
    make(tmp_path / "own", "a")

    def fail() -> None:
        with new_files(tmp_path / "own", overwrite=True, made_of={}) as new:
            (new / "a").write_text("half")
            raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        fail()
    assert (tmp_path / "own" / "a").read_text() == "new a"
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
