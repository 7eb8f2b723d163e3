"""How Sphinx builds the site: `nox -s docs`.

Sphinx, because the reference is made of docstrings, and a name that is not there is an error; MyST-NB, because the
pages are the Markdown that is read beside the code, too, and a notebook is a page with the outputs that are stored in
it. Nothing is fetched, and no notebook is run.
"""

import re

from docutils import nodes
from sphinx.domains.python import PyXRefRole
from sphinx.util.docutils import SphinxRole
from sphinx.util.inspect import signature, stringify_signature

import jax_router

project = "jax_router"
version = release = jax_router.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["images", "notebooks/data"]
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!jax_router).*")]  # what other projects document

# Pages
myst_heading_anchors = 4
nb_execution_mode = "off"

# The reference
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
default_role = "name-or-code"  # docstrings are written as Markdown is: `x` is code
napoleon_attr_annotations = False  # the descriptions say the dtypes and shapes
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 100

# What a reader sees
html_theme = "furo"
html_title = f"jax_router {release}"
html_show_copyright = False
html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"


class NameOrCode(SphinxRole):
    """What the package exports as a link, and any other code as it is."""

    def run(self):
        name = self.text.removeprefix("jax_router.").removesuffix("()")
        if name not in jax_router.__all__:
            return [nodes.literal(self.rawtext, self.text)], []
        return PyXRefRole()("py:obj", self.rawtext, f"{self.text} <jax_router.{name}>", self.lineno, self.inliner)


def _skip_fields(app, what, name, member, skip, options):
    """The class of a NamedTuple documents its fields."""
    return True if type(member).__name__ == "_tuplegetter" else None


def _signature_of_router(app, what, name, member, options, arguments, returned):
    """That of __init__, which Flax's metaclass hides."""
    if member is not jax_router.Router:
        return None
    return stringify_signature(signature(member.__init__, bound_method=True), unqualified_typehints=True), returned


def _read_as_sentences(app, what, name, member, options, lines):
    """Before Napoleon: no type is before the colon of a property's sentence, and an argument "E." is no list."""
    if what == "property":
        lines.insert(0, "")
    lines[:] = [re.sub(r"^(\s+\w+: [A-Z])\.$", r"\1\\.", line) for line in lines]


def setup(app):
    app.add_role("name-or-code", NameOrCode())
    app.connect("autodoc-skip-member", _skip_fields)
    app.connect("autodoc-process-signature", _signature_of_router)
    app.connect("autodoc-process-docstring", _read_as_sentences, priority=400)
