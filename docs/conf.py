"""The site of the documentation: `make docs`, which runs Sphinx on this folder with warnings as errors."""

import pathlib
import re
import sys

DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

from docutils import nodes  # noqa: E402
from latex2mathml.converter import convert  # noqa: E402
from reference import expand  # noqa: E402

from jsurgery.version import __version__  # noqa: E402

project, author, release = "jsurgery", "the authors of jsurgery", __version__
copyright = author
REPOSITORY = "https://github.com/jsurgery/jsurgery"
LINK_UPWARDS = re.compile(r"\]\(((?:\.\./)+[^)\s]*)\)")

extensions = ["myst_parser", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nitpicky = True
smartquotes = False  # they would turn the -- of a flag into a dash
html_theme = "furo"
html_title = "jsurgery"
html_math_renderer = "mathml"  # which browsers draw by themselves: MathJax would be fetched from the network
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["tables.js"]
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}
copybutton_exclude = ".linenos, .c1"  # comments beside commands


def setup(app) -> None:
    app.connect("source-read", prepare)
    app.add_html_math_renderer("mathml", (mathml("inline"), None), (mathml("block"), None))


def mathml(display: str):
    """What writes a formula's node as MathML: within a line, or as a block."""

    def visit(translator, node) -> None:
        translator.body.append(convert(node.astext(), display=display))
        raise nodes.SkipNode

    return visit


def prepare(app, name: str, source: list[str]) -> None:
    """Writes out the references of a page, and sends links to files outside this folder to the repository."""
    folder = (DOCS / name).parent

    def link(match: re.Match) -> str:
        target = (folder / match[1].partition("#")[0]).resolve()
        if target.is_relative_to(DOCS):
            return match[0]
        return f"]({REPOSITORY}/blob/main/{target.relative_to(DOCS.parent)})"

    source[0] = LINK_UPWARDS.sub(link, expand(source[0]))
