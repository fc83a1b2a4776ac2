"""How `make docs` makes a site, build/site, out of the pages that a plain viewer shows as they are.

The source folder is the root of the tree, so that links between pages and to files work the same there and here.
"""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Imported here: of a compiled module that nobody has imported, Sphinx reads the .pyi, which has no docstrings.
import lapse.testing.simulation  # noqa: E402
import lapse.worker  # noqa: E402

# In the order in which a new user reads. A page that is missing here, or that there is not, is an error.
NAVIGATION = {
    "Using Lapse": ["First steps <self>", "docs/install", "docs/api", "docs/reference", "docs/options", "docs/env",
                    "docs/deployment", "docs/migrating", "bindings/README"],
    "How it works": ["docs/architecture", "docs/protocol", "docs/testing", "verify/README", "benchmarks/README"],
    "The project": ["CHANGES", "CONTRIBUTING"],
}

project = "Lapse for Python"
version = release = lapse.__version__
root_doc = "README"
include_patterns = ["*.md", "*/README.md", "docs/*.md"]
exclude_patterns = [".*", "build", "dist"]
extensions = ["myst_parser", "sphinx.ext.autodoc"]

myst_heading_anchors = 4            # #a-heading, as GitHub has it
myst_links_external_new_tab = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "with_traceback, add_note"}
autodoc_typehints = "none"          # the compiled modules have none; docs/api.md says what is accepted
default_role = "code"
nitpicky = True
highlight_language = "text"

html_theme = "furo"                 # nothing in it comes from another server
html_title = f"Lapse for Python {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}


def adapt(app, docname, source):
    """What the site has by itself, and what a plain viewer needs: the list of the other pages, and those of a page's own sections.

    A link that is named for its file is named for the title that the reader will find there.
    """
    text = re.sub(r"\A(# .*\n(?:\n|(?!- |#).+\n)*?)(?:- \[.*\]\(#.*\)\n)+", r"\1", source[0])
    text = re.sub(r"\[[\w./]+\.md\]\(", "[](", text)
    if docname == root_doc:
        for caption, pages in NAVIGATION.items():
            text += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```\n"])
    source[0] = text


def add_front_door(app, error):
    """index.html, which a browser and a web server look for, leads to the front page."""
    if error is None and app.builder.name == "html":
        Path(app.outdir, "index.html").write_text('<!doctype html><meta charset="utf-8"><title>Lapse for Python</title>'
                                                  '<meta http-equiv="refresh" content="0; url=README.html">'
                                                  '<a href="README.html">Lapse for Python</a>\n', encoding="utf-8")


def setup(app):
    app.connect("source-read", adapt)
    app.connect("build-finished", add_front_door)
