#!/usr/bin/env python
"""Builds the documentation site in build/site, every warning an error: the guide, the results, the API reference.

Run: python .ci/site.py     (needs: pip install -c constraints.txt -e '.[docs]')
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "build/site-pages"


def collect() -> None:
    """Copies the pages as they lie in the repository, so that their links lead where they lead there."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "examples", PAGES / "examples", ignore=shutil.ignore_patterns("__pycache__", "runs"))
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"):
        shutil.copy(ROOT / name, PAGES / name)


if __name__ == "__main__":
    collect()
    subprocess.run([sys.executable, ROOT / ".ci/reference.py", PAGES / "reference"], check=True)
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / ".ci/site.yml"]
    subprocess.run(build, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
