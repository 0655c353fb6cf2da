"""`python -m fastft` is `fastft`."""

import sys

from fastft.cli import main

if __name__ == "__main__":
    sys.exit(main())
