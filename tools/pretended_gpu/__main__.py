"""Builds the pretended GPU and runs scripts on it.

    python -m tools.pretended_gpu build [--python PYTHON] FOLDER
    python -m tools.pretended_gpu run [--python PYTHON] FOLDER SCRIPT [ARGUMENT ...]

PYTHON, by default the environment's FASTFT_CUDA_PYTHON, is one whose torch is built for CUDA.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tools.pretended_gpu.build import MANIFEST, BuildError, build
from tools.pretended_gpu.running import environment


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("build", "run"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        command.add_argument("--python", default=os.environ.get("FASTFT_CUDA_PYTHON", sys.executable))
    commands.choices["run"].add_argument(
        "arguments", nargs=argparse.REMAINDER, help="of PYTHON: a script, or -m MODULE"
    )
    options = parser.parse_args(argv)
    try:
        manifest = build(options.folder, options.python)
        if options.command == "run":
            os.execve(options.python, [options.python, *options.arguments], environment(options.folder))
    except BuildError as error:
        sys.exit(str(error))
    print(
        f"for torch {manifest.torch}, in {options.folder}; {len(manifest.unwritten)} functions that torch could call "
        f"are not written (they are listed in {options.folder / MANIFEST}) and say so when they are called"
    )


if __name__ == "__main__":
    main()
