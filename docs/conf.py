"""How the documentation is built: ``make docs``."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

project = "attnreg"
author = "the attnreg developers"
project_copyright = "the attnreg developers"
release = version = metadata.version("attnreg")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"attnreg {release}"
html_copy_source = False
pygments_style, pygments_dark_style = "default", "native"

# A reference that leads nowhere is an error. Types of other libraries are not documented here.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!attnreg).*"),
    (
        r"py:.*",
        r"attnreg\.(backend\.(Fault|Gradients|Function)|measured\..*|request\..*|registry\.Registry|op\..*|problem\.Given|tables\..*"
        r"|testing\.(inputs|property)\..*)",
    ),
]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
copybutton_prompt_text = "$ "

# Links of pages that lie in the repository's root, which are included here, to files that are no pages.
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)\s]+)\)")


def _without_links_to_files(_app: Any, _path: Any, _parent: str, source: list[str]) -> None:
    source[0] = _LINK.sub(r"\1", source[0])


def _with_defaults(
    _app: Any, _what: str, _name: str, _object: Any, _options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Write ``{}`` for a default that is made anew for each object: a signature with ``<factory>`` cannot be parsed."""
    return signature and signature.replace("<factory>", "{}"), returns


def setup(app: Any) -> None:
    """Register what is done to included files and to signatures."""
    app.connect("include-read", _without_links_to_files)
    app.connect("autodoc-process-signature", _with_defaults)
