from __future__ import annotations

import subprocess
import sys


def test_transformers_is_not_imported_before_it_is_used_and_using_says_what_to_install() -> None:
    """Importing works without it, then, and is asked of one process."""
    code = (
        "import sys\n"
        "import fastft.integrations\n"
        "from fastft.integrations.transformers import accelerate, register\n"
        "from fastft import UserError\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"
        "for use in (register, lambda: accelerate(None)):\n"
        "    try: use()\n"
        "    except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == 2 * "transformers is not installed, expected it here: pip install 'fastft[transformers]'\n"
