"""Configure Sphinx: the pages of this folder and the docstrings become HTML, by ``make docs``.

The pages draw no formula and fetch nothing: formulas are text in literal blocks.
"""

import re

import mhc_ops

project = "mhc-ops"
author = "the mhc-ops authors"
version = release = mhc_ops.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # the anchors that links between the pages name

# A reference that leads nowhere is a warning, but for what other packages document.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|functools|pathlib|torch|transformers|typing)\b.*"),
    (r"py:.*", r"mhc_ops\.routes\.Key"),  # a record of the package, not of its interface
    (r"py:data", r".*"),  # the tables are named, not printed
]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types, with shapes
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Several arguments may share one line, which a field for each cannot say.
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]

html_theme = "furo"
html_title = f"mhc-ops {release}"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
pygments_style = "friendly"
highlight_language = "text"  # of literal blocks: formulas and tables; doctests are Python anyway
smartquotes_action = "qD"  # quotes and dashes; the dots of [..., n, H] are code
autodoc_preserve_defaults = True


def _skip(app, what, name, obj, skip, options):
    """Leave out the fields of named tuples, which ``Attributes`` of the docstring explains."""
    field = re.match(r"Alias for field number \d+", getattr(obj, "__doc__", None) or "")
    return True if field else None


def _hand_out(app, docname, source):
    """Make a link to Markdown outside of this folder hand out the file, as links to code do."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)\)", r"](path:\1)", source[0])


def setup(app):
    """Register what this file adds."""
    app.connect("autodoc-skip-member", _skip)
    app.connect("source-read", _hand_out)
