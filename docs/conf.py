"""The site: the repository's pages, and the API from its docstrings. `make docs` builds it.

The repository is the source folder, so that a relative link is the same on GitHub and in the site.
"""

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `bench` and the tests are not installed

project = "svitt-ops"
copyright = "the authors of svitt-ops"
html_title = project
root_doc = "docs/index"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/**",
    "training/recipes/README.md",
]
exclude_patterns = [".git", ".venv", "build", "docs/extra", "bench", "csrc", "tests"]

myst_heading_anchors = 3
highlight_language = "none"
default_role = "literal"  # a docstring's `name`

autodoc_default_options = {"members": True, "exclude-members": "config_class"}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
# Names that are not ours are documented elsewhere; what models and training are made of, nowhere.
nitpick_ignore_regex = [("py:.*", r"(?!svitt_ops\.(?!models\.|training\.|randomness\.)).*")]

html_theme = "furo"
html_extra_path = ["extra"]  # the first page, which leads to docs/
html_copy_source = False
html_show_sphinx = False

PICTURE = re.compile(
    r'<picture>\s*<source [^>]*srcset="(?P<dark>[^"]+)">\s*'
    r'<img alt="(?P<words>[^"]+)" src="(?P<light>[^"]+)" width="(?P<width>\d+)">\s*</picture>'
)


def _images(_: Sphinx, __: str, text: list[str]) -> None:
    """A `<picture>` of GitHub's pages as the theme's two images, which Sphinx then copies."""
    text[0] = PICTURE.sub(
        lambda found: "\n\n".join(
            f"```{{image}} {found[theme]}\n:alt: {found['words']}\n:width: {found['width']}px\n"
            f":class: only-{theme}\n```"
            for theme in ("light", "dark")
        ),
        text[0],
    )


def _signature(*given: Any) -> tuple[str, None] | None:
    """None of a configuration, whose hundred keywords are its fields, and of transformers."""
    _, what, name = given[:3]
    return ("", None) if what == "class" and name.endswith("Config") else None


def _remark(*given: Any) -> None:
    """Napoleon takes what stands before a colon in an attribute's first line for its type."""
    if given[1] in ("attribute", "data", "property"):
        given[-1].insert(0, "")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _images)
    app.connect("autodoc-process-docstring", _remark, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _signature)
