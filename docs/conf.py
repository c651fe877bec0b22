"""The documentation site. Build it with `sphinx-build -W --keep-going docs docs/_build`."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

from gapt_optim import __version__

project = "gapt_optim"
author = "the gapt_optim developers"
copyright = "the gapt_optim developers, MIT licence"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "generated/*.md"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"gapt_optim {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """Where a page's first table links to pages, they are its contents, for the sidebar."""
    if name.rpartition("/")[2] == "index":
        rows = "\n".join(line for line in source[0].splitlines() if line.startswith("|"))
        pages = dict.fromkeys(re.findall(r"\]\(([\w/]+)\.md\)", rows))
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(pages) + "\n```\n"


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_contents)
