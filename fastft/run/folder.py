"""A run is a folder: the names of its files, and where each lies."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastft.common import files
from fastft.common.errors import UserError
from fastft.common.nearest import did_you_mean_path
from fastft.data.chat_template import AnyTemplate, template_described, template_named
from fastft.data.folder_tokenizer import NAMES as TOKENIZER_FILES
from fastft.data.folder_tokenizer import tokenizer_of
from fastft.data.tokenizer import Tokenizer, gpt2_tokenizer
from fastft.model.names import ADAPTER, ADAPTER_CONFIG, WEIGHTS
from fastft.run.config import CONFIG_BEGINS, TrainOptions, from_yaml
from fastft.run.decodings import SPLIT_NAMES, UNNAMED, called, page_called

CONFIG, DATA, METRICS, LEDGER = "config.yaml", "data.json", "metrics.jsonl", "ledger.jsonl"
TRACKERS = "trackers.json"
RESPONSES, SCORES, JUDGE_REPLIES = "responses.json", "scores.json", "judge-replies.jsonl"
CONVERSATIONS = "conversations.json"
REPORT, REPORT_NUMBERS, PLOTS = "report.html", "report.json", "plots"
AB_PAGE, AB_NUMBERS = "ab.html", "ab.json"
COMPARISON, COMPARISON_ELSEWHERE = "compare-{}.json", "compare.json"
"""With the name of the run that it is compared to; in a folder of one's own without."""
DEMO = "demo.json"
"""The names of what a run's folder holds, which stages give to each other."""

EXPORT_MADE = "export.json"
"""Beside what `fastft export` has written: what that is, and of what it was made."""
EXPORTED = {
    "hf": ("model*.safetensors", f"{WEIGHTS}.index.json", "config.json", "generation_config.json", *TOKENIZER_FILES,
           "README.md"),
    "peft": (ADAPTER, ADAPTER_CONFIG, *TOKENIZER_FILES, "README.md"),
    "gguf": ("model.gguf",),
    "gguf-adapter": ("adapter.gguf",),
    "ollama": ("model.gguf", "Modelfile"),
    "book": ("model.pth", *TOKENIZER_FILES),
}  # fmt: skip
"""By format, the files of an export."""

_RESULTS = (
    *(RESPONSES, "responses.val.json", "responses.train.json", CONVERSATIONS, SCORES, JUDGE_REPLIES),
    *(REPORT, REPORT_NUMBERS, AB_PAGE, AB_NUMBERS, COMPARISON.format("*")),
)
_ANSWERS = ("responses", "conversations")
_BESIDE_ANSWERS = (".made-from.json", ".journal.jsonl")
_CHECKPOINTS = ("step", "best", "shards")
_IN_CHECKPOINTS = ("*.safetensors", "state.json", "DONE", "zero/*.pt", "zero_to_fp32.py", ".*.tmp")
_IN_FOLDERS = {
    "checkpoints": tuple(
        f"{folder}/{file}"
        for kind in _CHECKPOINTS
        for folder in (f"{kind}-*", f".{kind}-*.tmp")
        for file in _IN_CHECKPOINTS
    ),
    "hangs": ("rank-*.txt",),
    PLOTS: tuple(
        f"{name}.{kind}" for name in ("loss", "learning-rate", "tokens", "scores") for kind in ("svg", "png", "pdf")
    ),
    "model": (WEIGHTS, "config.json", "generation_config.json", ADAPTER, ADAPTER_CONFIG, *TOKENIZER_FILES, ".*.tmp"),
    "tokenizer": (*TOKENIZER_FILES, ".*.tmp"),
    "tensorboard": ("events.out.tfevents.*",),
    "export": (
        *(f"{kind}/{file}" for kind, names in EXPORTED.items() for file in (*names, EXPORT_MADE)),
        ".*.tmp/*",
    ),
}
"""What fastft writes into the folders of a run's folder."""


@dataclass(frozen=True, slots=True)
class Run:
    """The paths of a run's folder."""

    folder: Path

    @property
    def config(self) -> Path:
        """The options that it was trained with."""
        return self.folder / CONFIG

    @property
    def data(self) -> Path:
        """What the training data was, and the rows that something happened to."""
        return self.folder / DATA

    @property
    def metrics(self) -> Path:
        """One JSON line a step."""
        return self.folder / METRICS

    @property
    def ledger(self) -> Path:
        """One JSON line a step with the loss of each of its examples."""
        return self.folder / LEDGER

    @property
    def trackers(self) -> Path:
        """By which ids trackers know the run."""
        return self.folder / TRACKERS

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def hangs(self) -> Path:
        """Where each rank of a run that hung was, by its own words."""
        return self.folder / "hangs"

    @property
    def tokenizer(self) -> Path:
        """The files of the tokenizer that the run trains with, where it is not GPT-2's own."""
        return self.folder / "tokenizer"

    @property
    def weights(self) -> Path:
        """The trained model's weights: of a run that trained adapters these alone, with the hash of their base inside,
        so that the file's hash tells one model from another all the same."""
        return self.model / ADAPTER if self.has_adapter else self.model / WEIGHTS

    @property
    def has_adapter(self) -> bool:
        """Whether the result is an adapter."""
        return (self.model / ADAPTER).exists()

    @property
    def model(self) -> Path:
        """The folder of the result: Hugging Face's, or an adapter in PEFT's layout."""
        return self.folder / "model"

    def exported(self, kind: str) -> Path:
        """Where an export of a format goes, unless it is told otherwise."""
        return self.folder / "export" / kind

    @property
    def responses(self) -> Path:
        """The test entries with `model_response`."""
        return self.responses_of("test")

    def responses_of(self, part: str, name: str | None = None) -> Path:
        """The entries of `train`, `val` or `test` with `model_response`; what is scored is the test's.

        Args:
            part: the split.
            name: of a set of answers that was decoded in a way of its own.
        """
        return self.folder / called("responses" if part == "test" else f"responses.{part}", name)

    def conversations(self, name: str | None = None) -> Path:
        """The conversations that the model had, turn by turn."""
        return self.folder / called("conversations", name)

    def scores(self, name: str | None = None) -> Path:
        """The scores of the responses of a name, and of the conversations."""
        return self.folder / called("scores", name)

    def written(self) -> list[Path]:
        """The files that fastft has written into the folder, what tells that it holds a run last. What is a link stands
        for itself: nothing behind it is named."""
        names = (DEMO, *_RESULTS, LEDGER, TRACKERS)
        found = [path for name in names for path in sorted(self.folder.glob(name))]
        found += self._answers()
        for name, patterns in _IN_FOLDERS.items():
            if (folder := self.folder / name).is_symlink():
                found.append(folder)
            else:
                found += [path for pattern in patterns for path in sorted(_within(folder, pattern))]
        found += [self.metrics, self.data, self.config]
        return [path for path in dict.fromkeys(found) if path.is_symlink() or path.exists()]

    def _answers(self) -> list[Path]:
        """What lies beside answers, and the answers, scores and ratings of the names that are told by it: what somebody
        has copied to `scores.old.json` is theirs."""
        found, names = [], [UNNAMED]
        for kind, end in itertools.product(_ANSWERS, _BESIDE_ANSWERS):
            for path in sorted(self.folder.glob(f"{kind}*{end}")):
                name = path.name.removesuffix(end)
                found += [path, self.folder / f"{name}.json"]
                own = name.removeprefix(f"{kind}.")
                if own not in (kind, *SPLIT_NAMES):
                    names.append(own)
        found += [self.scores(own) for own in names[1:]]
        pairs = {(one, one) for one in names[1:]} | {*itertools.permutations(dict.fromkeys(names), 2)}
        return found + [
            self.folder / page_called(file, pair) for pair in sorted(pairs) for file in (AB_PAGE, AB_NUMBERS)
        ]

    def refuse_files_of_others(self, inputs: Iterable[tuple[str, Path]]) -> None:
        """Looks for files under the names that a run writes, or that `--overwrite` removes, which are not this run's.

        Args:
            inputs: options and the files that they name, which the run reads.

        Raises:
            UserError: an input lies there, or no run of fastft has written what is there.
        """
        found = self.written()
        places = {path.resolve(): path for path in (*found, self.config, self.data, self.metrics, self.ledger)}
        for name, path in inputs:
            if path.resolve() in places:
                raise UserError(
                    f"got --{name} {path}, which lies under a name that a run writes in {self.folder}; move it, or "
                    "take another --out"
                )
        if found and not self._is_fastfts():
            raise UserError(
                f"{found[-1]} is there, and no run of fastft's has written it ({CONFIG} is not a run's): "
                "a run would replace it; move it away, or take another --out"
            )

    def _is_fastfts(self) -> bool:
        """Whether a run of fastft's has been here: by its options, however edited, or else by a whole checkpoint."""
        with contextlib.suppress(OSError), self.config.open("rb") as file:
            if file.readline(100).startswith(CONFIG_BEGINS.encode()):
                return True
        with contextlib.suppress(UserError):
            from_yaml(self.config)
            return True
        return any(self.checkpoints.glob("*-*/DONE"))

    def clear(self) -> None:
        """Removes what fastft has written into the folder, and nothing else; folders that are then empty too.

        Raises:
            UserError: something of it cannot be removed; then nothing has been.
        """
        paths = self.written()
        for path in paths:
            if path.is_dir() and not path.is_symlink():
                raise UserError(f"--overwrite: {path} is a folder, expected a file of fastft's; move it away")
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise UserError(f"--overwrite: {path} cannot be removed; check the permissions of {path.parent}")
        for path in paths:
            path.unlink(missing_ok=True)
        parents = {parent for path in paths for parent in path.parents if self.folder in parent.parents}
        for folder in sorted(parents, key=lambda parent: -len(parent.parts)):
            with contextlib.suppress(OSError):  # somebody else's files are in it
                folder.rmdir()

    def has_place_for(self, path: Path) -> bool:
        """Whether a path lies under a name that stages of this run write, other than exports."""
        names = {CONFIG, METRICS, DATA, LEDGER, TRACKERS, DEMO, *_RESULTS, *_IN_FOLDERS} - {"export"}
        if self.folder.resolve() not in path.resolve().parents:
            return False
        first = path.resolve().relative_to(self.folder.resolve()).parts[0]
        return first in names or first.partition(".")[0] in (*_ANSWERS, "scores", "ab")

    def holds_something(self) -> bool:
        """Whether a run has left something in the folder that another one would replace."""
        left = (
            self.config,
            self.metrics,
            self.weights,
            self.responses,
            *self.checkpoints.glob("*-*/DONE"),
        )
        return any(path.exists() for path in left)

    def remove_leftovers(self) -> None:
        """Removes what a killed training had half written: hidden files and folders beside their places."""
        names = [f".{name}.*.tmp" for name in (CONFIG, DATA, METRICS, LEDGER, TRACKERS)]
        for pattern in (
            *names,
            *(f"checkpoints/.{kind}-*.tmp" for kind in _CHECKPOINTS),
            "model/.*.tmp",
            "tokenizer/.*.tmp",
        ):
            for path in list(self.folder.glob(pattern)):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def own_tokenizer(self) -> Tokenizer:
        """The tokenizer that the run trains with: its own, or GPT-2's where it keeps none."""
        return tokenizer_of(self.tokenizer) or gpt2_tokenizer()

    def template(self) -> AnyTemplate:
        """The template that the run was trained with: what was written down of it, as a file may have changed since.

        Raises:
            UserError: the run's folder does not say it.
        """
        described = files.object_or_empty(self.data).get("template")
        if isinstance(described, dict):
            return template_described(described, str(self.data))
        return template_named(self.options().template)

    def options(self) -> TrainOptions:
        """The options that the run was trained with."""
        if not self.folder.is_dir():
            near = did_you_mean_path(self.folder)
            raise UserError(f"run folder not found: {self.folder}{near}; --run takes the folder that train wrote")
        return from_yaml(self.config)


def _within(folder: Path, pattern: str) -> Iterator[Path]:
    """The paths of a pattern such as `step-*/DONE`; where a link comes on the way, the link."""
    first, _, rest = pattern.partition("/")
    for path in folder.glob(first):
        if not rest or path.is_symlink():
            yield path
        else:
            yield from _within(path, rest)


def names_of(folders: Sequence[Path]) -> list[str]:
    """What runs are called beside each other: their folders' own names, or the whole paths where two have one name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
