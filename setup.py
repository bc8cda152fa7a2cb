"""The build is described by pyproject.toml and CMakeLists.txt; this only sends ``python setup.py install`` to pip."""

import subprocess
import sys

if __name__ == "__main__":
    arguments = {"install": ["."], "develop": ["-e", "."]}.get((sys.argv[1:] or ["install"])[0])
    if arguments is None:
        sys.exit("use: pip install .")
    sys.exit(subprocess.call([sys.executable, "-m", "pip", "install", *arguments]))
