"""The documentation site. Build it with `sphinx-build -W --keep-going docs docs/_build`."""

from __future__ import annotations

import sys
from pathlib import Path

from gapt_optim import __version__

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "gapt_optim"
author = "the gapt_optim developers"
copyright = "the gapt_optim developers, MIT licence"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "settings",  # {settings}: the fields of a configuration class, from their docstrings
    "evidence",  # {evidence}: the generated tables of one experiment
    "cost",  # {cost}: what benchmarks/cost has measured
    "findings",  # {findings}: what `gapt-optim doctor` can say
    "messages",  # {messages}: every error and warning of the library, from its source
]
exclude_patterns = ["_build", "generated/*.md"]
myst_enable_extensions = ["colon_fence", "deflist"]
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
