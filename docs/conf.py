"""The site of `make docs`: README.md, CONTRIBUTING.md, CHANGELOG.md, bench/README.md and the pages of this folder.

The root of the repository is its source folder, so that links between pages lead to the same place here and on GitHub.
"""

import shutil
from pathlib import Path

from sphinx.application import Sphinx

import rococap

project = "rococap"
release = version = rococap.__version__
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md", "docs/*.md"]
exclude_patterns = [".*", "build", "demo", "dist", "docs/_build", "migrations", "rococap", "tests"]

nitpicky = True
myst_heading_anchors = 3  # links such as operations.md#the-spool
html_theme = "furo"
html_title = "rococap"
html_copy_source = False

CONTENTS = """

```{toctree}
:hidden:

docs/guide
docs/models
docs/operations
docs/scaling
docs/web
docs/serving
docs/scores
docs/finetuning
docs/review
docs/publishing
docs/cli
docs/performance
docs/architecture
docs/decisions
docs/log
docs/mutants
bench/README
CONTRIBUTING
CHANGELOG
```
"""


def _add_contents(app: Sphinx, page: str, text: list[str]) -> None:
    """The README is read on GitHub and PyPI too, which would show a table of contents as code."""
    if page == root_doc:
        text[0] += CONTENTS


def _add_index(app: Sphinx, error: Exception | None) -> None:
    if error is None:
        shutil.copyfile(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app: Sphinx) -> None:
    app.connect("source-read", _add_contents)
    app.connect("build-finished", _add_index)
