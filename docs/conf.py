"""Sphinx makes the site of these pages; ``generated.py`` adds reference pages from the code.

The folder of sources is the project's root, so relative links work here and on GitHub.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

from generated import addition  # noqa: E402

PAGES = {"docs", "results", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"}

project = html_title = "FeatureGAN"
root_doc = "docs/index"
include_patterns = ["**.md"]
exclude_patterns = [path.name for path in ROOT.iterdir() if path.name not in PAGES]
exclude_patterns += ["docs/_build"]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxcontrib.mermaid",
]

html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_extra_path = ["index.html"]
html_show_copyright = False
html_copy_source = False

myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
mermaid_version = "11.12.0"

nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!featurestore|stages).*"),  # names of other libraries
    # Modules that docs/api.md leaves out, and that its docstrings name.
    ("py:.*", r"featurestore\.(layers|layouts|prepared_sample)(\..*)?"),
    ("py:class", r"stages\.use\.windows\.WindowedImage"),
]
default_role = "code"
smartquotes_action = "D"  # only dashes: quotes in commands are those of a shell
napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}


def add_generated(app: Sphinx, page: str, source: list[str]) -> None:
    """Add to the text of a page what is made from the code."""
    source[0] += addition(page, source[0])


def setup(app: Sphinx) -> None:
    """Connect the event."""
    app.connect("source-read", add_generated)
