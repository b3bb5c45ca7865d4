"""Sphinx's settings for the site that scripts/docs builds."""

import re
from pathlib import Path

import tomllib
from sphinx.application import Sphinx

import mlx_adadelta

URLS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())[
    "project"
]["urls"]

project = "mlx-adadelta"
author = "The mlx-adadelta authors"
project_copyright = "2026, " + author
release = mlx_adadelta.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # the site needs no other host
]

# The pages are written for GitHub, whose notation this is.
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4

# The docstrings name types in plain words.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_param = False
napoleon_use_rtype = False
maximum_signature_line_length = 80
linkcheck_anchors = False  # GitHub makes them in the browser
linkcheck_retries = 3
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"mlx\..*")]

html_theme = "sphinx_book_theme"
html_title = "mlx-adadelta"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_theme_options = {
    "show_toc_level": 2,
    "repository_url": URLS["Repository"],
    "use_repository_button": True,
    "navbar_persistent": [],  # the sidebar has a search field
    "navigation_with_keys": False,
}


def adapt(app: Sphinx, page: str, source: list[str]) -> None:
    """Turns a page's text for GitHub into one for Sphinx."""
    # What lies outside of docs is not part of the site.
    text = source[0].replace("](../", f"]({URLS['Repository']}/blob/main/")
    if page == "index":  # the sidebar is made of its lists
        for section in text.split("\n## ")[1:]:
            title = section.partition("\n")[0]
            pages = re.findall(r"^- .*?\]\((\w+)\.\w+\)", section, re.M)
            text += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n"
            text += "\n".join(pages) + "\n```\n"
    source[0] = text


def setup(app: Sphinx) -> None:
    app.connect("source-read", adapt)
