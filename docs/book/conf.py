"""How the book is built; ``python docs/book/make_book.py`` lays its pages out and calls Sphinx."""

from pathlib import Path

import fluxlib

project = "FLUX suite"
author = "The FLUX suite maintainers"
copyright = "The FLUX suite maintainers, Apache-2.0"
release = version = fluxlib.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.apidoc", "sphinx.ext.napoleon"]
# One page per part of the library. What a package passes on is described where it is defined.
apidoc_modules = [
    {"path": str(Path(fluxlib.__file__).parent), "destination": "api", "module_first": True,
     "exclude_patterns": ["**/__main__.py"]}
]  # fmt: skip
autodoc_default_options = {
    "members": True, "ignore-module-all": True, "member-order": "bysource", "show-inheritance": True,
}  # fmt: skip
exclude_patterns = ["config", "figures/README.md"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_merge_streams = True
# Docstrings say in plain words what a type checker reads from the signature.
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
# What a class of another library says of itself is not written for this book.
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Pages of the repository that stand alone there, and headings that skip a level in a notebook.
suppress_warnings = [
    "myst.header", "toc.not_included", "docutils", "ref.python", "mystnb.unknown_mime_type",
]  # fmt: skip

html_theme = "sphinx_book_theme"
html_title = "FLUX suite"
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "navbar_persistent": [],
}
html_copy_source = False
html_show_sourcelink = False
