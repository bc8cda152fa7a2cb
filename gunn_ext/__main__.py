"""``python -m gunn_ext`` is the command ``gunn``."""

import sys

from gunn_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
