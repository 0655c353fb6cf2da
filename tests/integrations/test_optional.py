from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def test_without_transformers_importing_works_and_using_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import fastft.integrations\n"
        "from fastft.integrations.transformers import accelerate, register\n"
        "from fastft import UserError\n"
        "for use in (register, lambda: accelerate(None)):\n"
        "    try: use()\n"
        "    except UserError as error: print(error)"
    )
    assert run(code) == 2 * "transformers is not installed, expected it here: pip install 'fastft[transformers]'\n"


def test_transformers_is_not_imported_before_it_is_used() -> None:
    run("import sys, fastft.integrations.transformers; assert 'transformers' not in sys.modules")
