"""`python -m fastft.scaling --markdown` writes docs/scaling.md; without the option it is printed."""

import argparse
import sys

from fastft.common import files
from fastft.common.errors import UserError
from fastft.scaling.page import PAGE, page


def main() -> None:
    """Writes or prints the page."""
    parser = argparse.ArgumentParser(prog="python -m fastft.scaling", description="What training on many ranks costs.")
    parser.add_argument("--markdown", action="store_true", help=f"write docs/{PAGE.name} of this checkout")
    write = parser.parse_args().markdown
    try:
        text = page()
    except UserError as error:
        parser.error(str(error))
    if write:
        files.write_text(PAGE, text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
