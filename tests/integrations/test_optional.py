from __future__ import annotations

import subprocess
import sys

import pytest

USES = {
    "transformers": "from fastft.integrations.transformers import accelerate; accelerate(None)",
    "register": "from fastft.integrations.transformers import register; register()",
}


@pytest.mark.parametrize("use", USES)
def test_without_transformers_importing_works_and_using_says_what_to_install(use: str) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import fastft.integrations, fastft.integrations.transformers\n"
        "from fastft import UserError\n"
        f"try: {USES[use]}\n"
        "except UserError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert said == "transformers is not installed, expected it here: pip install 'fastft[transformers]'\n"
    code = "import sys, fastft.integrations.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
