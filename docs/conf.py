# SPDX-License-Identifier: Apache-2.0
"""Settings of ``sphinx-build -W --keep-going docs docs/_build/html``.

Nothing is fetched, and no notebook is run: they are committed with their outputs.
"""

import ast
import inspect
import pathlib
import re

import adahessian_jax

HERE = pathlib.Path(__file__).parent

project = "adahessian_jax"
author = "The adahessian_jax authors"
copyright = author
release = version = adahessian_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True
nb_execution_mode = "off"
nb_render_image_options = {"alt": "Plot made by the cell above"}
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
mathjax_path = "https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"
# For \texttt inside \text.
mathjax3_config = {
    "loader": {"load": ["[tex]/textmacros"]},
    "tex": {"packages": {"[+]": ["textmacros"]}},
}
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"adahessian_jax {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {"top_of_page_buttons": []}
html_copy_source = False

add_module_names = False
autodoc_preserve_defaults = True
autodoc_use_legacy_class_based = False
maximum_signature_line_length = 68
python_use_unqualified_type_names = True
napoleon_attr_annotations = False
napoleon_numpy_docstring = False
# Types in signatures whose documentation is elsewhere.
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|flax|jax|nnx|optax|train_state|typing)\..*"),
    (r"py:.*", r"Any|Array(Like)?|Callable|DTypeLike|KeyPath|Mapping|Result"),
    (r"py:.*", r"Bases|Traces"),
]
# Names of the library's own that stand for other types.
ALIASES = {
    "AveragingRule": "Callable[[KeyPath, Array], Array]",
    "AxisName": "str | tuple[str, ...] | None",
    "Betas": "tuple[ArrayLike, ArrayLike]",
    "Probe": "Callable[[Array, optax.Params], optax.Params]",
    "Stacked": "Callable[[KeyPath, Array], int]",
}


def copy_notebooks():
    """Put copies of the notebooks where Sphinx looks for pages.

    Files that have not changed are left alone, so that their pages are not built anew.
    """
    source, target = HERE.parent / "notebooks", HERE / "notebooks"
    target.mkdir(exist_ok=True)
    contents = {path.name: path.read_bytes() for path in source.glob("*.ipynb")}
    for path in target.iterdir():
        if path.name not in contents:
            path.unlink()
    for name, content in contents.items():
        path = target / name
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)


class _Aliases(ast.NodeTransformer):
    """Write out names that stand for other types."""

    def visit_Name(self, node):
        if node.id not in ALIASES:
            return node
        return ast.parse(ALIASES[node.id], mode="eval").body


def signature_as_written(app, what, name, obj, options, signature, returns):
    """Show annotations as they are in the source.

    Python has evaluated them: ``optax.Params`` would be a page of unions.
    """
    if what not in ("class", "function", "method"):
        return None
    is_tuple = what == "class" and "_fields" in vars(obj)
    if what == "class" and not is_tuple:
        if "__new__" not in vars(obj):  # inherited, and not the way to make one
            return "", None
        function = obj.__new__
    else:
        function = obj
    source = inspect.getsource(function)
    if source[0] == " ":  # a method
        source = "if True:\n" + source
    node = ast.parse(source).body[0]
    node = _Aliases().visit(node.body[0] if isinstance(node, ast.If) else node)
    if is_tuple:
        fields = [ast.unparse(x) for x in node.body if isinstance(x, ast.AnnAssign)]
        return f"({', '.join(fields)})", None
    if what in ("class", "method"):
        node.args.args.pop(0)
    returns = None
    if what != "class" and node.returns is not None:
        returns = ast.unparse(node.returns).strip("'")
    return f"({ast.unparse(node.args)})", returns


def links_between_folders(app, docname, source):
    """Let links that are right in the repository be right on the site.

    Here the notebooks are copied to docs/, there they lie beside it.
    """
    if docname.startswith("notebooks/"):
        source[0] = source[0].replace("](../docs/", "](../")
    else:
        source[0] = source[0].replace("](../notebooks/", "](notebooks/")


def break_long_names(app, pagename, templatename, context, doctree):
    """Let long names in running text and tables break after underscores and dots."""

    def with_breaks(code):
        if len(re.sub(r"<[^>]*>", "", code[0])) < 26:
            return code[0]
        # Not inside the tags that are within the code's own.
        return re.sub(r"(::|[_.=(])(?=\w)(?![^<]*>)", r"\1<wbr>", code[0])

    if "body" in context:
        context["body"] = re.sub("<code .*?</code>", with_breaks, context["body"])


def setup(app):
    """Connect the functions above."""
    copy_notebooks()
    app.connect("autodoc-process-signature", signature_as_written)
    app.connect("source-read", links_between_folders)
    app.connect("html-page-context", break_long_names)
