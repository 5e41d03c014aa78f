"""The command line as `python -m shrinkkit.cli`."""

import sys

from shrinkkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
