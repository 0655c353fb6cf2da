"""What a run began with, as far as it is known when it is exported: nothing is guessed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml

from fastft.common import files
from fastft.common.keywords import is_keyword
from fastft.model.names import WEIGHTS
from fastft.run.config import TrainOptions
from fastft.run.given import weights_of

_PUBLISHED = "openai-community/"
_LICENCE_OF_PUBLISHED = "mit"
"""By the model cards of openai-community/gpt2 and its larger sizes."""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, slots=True)
class Base:
    """The weights that a run started from.

    Attributes:
        what: a sentence's part that names them.
        hub_id: theirs, where they are from the Hugging Face hub.
        licence: theirs, where it is known.
        hashes: SHA-256 by file name; of the files as they are now, unless the run has written them down.
        recorded: whether it has.
    """

    what: str
    hub_id: str | None = None
    licence: str | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    recorded: bool = False


def base_of(options: TrainOptions, recorded: Mapping[str, str] | None = None) -> Base:
    """What a run with these options began with.

    Args:
        options: the run's.
        recorded: the hashes that it wrote down when it began; None where it did not.
    """
    found = _found(options)
    return found if recorded is None else replace(found, hashes=dict(recorded), recorded=True)


def _found(options: TrainOptions) -> Base:
    source = weights_of(options)
    if source is None:
        return Base(f"random weights (size `{options.model}`, seed {options.seed})")
    if is_keyword("weights", source):
        return _of_the_hub(_PUBLISHED + source, _LICENCE_OF_PUBLISHED)
    path = Path(source).expanduser()
    if path.is_dir():
        return Base(f"the folder `{path.name}`", licence=_licence_in(path), hashes=_hashes(path.glob("*.safetensors")))
    if path.is_file():
        return Base(f"the file `{path.name}`", hashes=_hashes([path]))
    if _HUB_ID.fullmatch(source) and not path.is_absolute():
        return _of_the_hub(source, _LICENCE_OF_PUBLISHED if source.startswith(f"{_PUBLISHED}gpt2") else None)
    return Base(f"`{path.name}`, which is not there any more")


def _of_the_hub(hub_id: str, licence: str | None) -> Base:
    found = None
    with contextlib.suppress(Exception):  # of a cache that is not there or is odd, nothing is known
        found = huggingface_hub.try_to_load_from_cache(hub_id, WEIGHTS)
    hashes = _hashes([Path(found)]) if isinstance(found, str) else {}
    return Base(f"[{hub_id}](https://huggingface.co/{hub_id})", hub_id, licence, hashes)


def _hashes(paths: Any) -> dict[str, str]:
    return {path.name: str(files.identity(path)["sha256"]) for path in sorted(paths)}


def _licence_in(folder: Path) -> str | None:
    """What the head of a folder's model card says."""
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        text = (folder / "README.md").read_text(encoding="utf-8")
        if (head := re.match(r"---\n(.*?)\n---", text, re.DOTALL)) and isinstance(
            said := yaml.safe_load(head[1]), dict
        ):
            return said["license"] if isinstance(said.get("license"), str) else None
    return None
