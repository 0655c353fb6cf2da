"""`python -m fastft.scaling --markdown` writes docs/scaling.md; without the option it is printed."""

import argparse
import sys

from fastft.scaling.page import PAGE, page


def main() -> None:
    """Writes or prints the page."""
    parser = argparse.ArgumentParser(prog="python -m fastft.scaling", description="What training on many ranks costs.")
    parser.add_argument("--markdown", action="store_true", help=f"write docs/{PAGE.name} of this checkout")
    if parser.parse_args().markdown:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())


if __name__ == "__main__":
    main()
