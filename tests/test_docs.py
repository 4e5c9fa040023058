# SPDX-License-Identifier: Apache-2.0
"""The pages' code runs, what they name exists, and the reference is complete."""

import importlib
import inspect
import json
import pathlib
import re

import flax.nnx
import jax
import jax.numpy as jnp
import optax
import pytest

import adahessian_jax as ah

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Copies of the notebooks and what Sphinx builds are not pages.
PAGES = {
    page.relative_to(DOCS).with_suffix("").as_posix(): page
    for page in sorted(DOCS.rglob("*.md"))
    if page.relative_to(DOCS).parts[0] not in ("_build", "notebooks")
} | {"README": ROOT / "README.md"}
TEXTS = {name: page.read_text(encoding="utf-8") for name, page in PAGES.items()}
for_new_versions = pytest.mark.skipif(
    not hasattr(jax, "shard_map") or not hasattr(flax.nnx, "as_pure"),
    reason="the pages are for JAX 0.8 and Flax 0.12 or newer",
)


AT_ONCE = {"README", "index", "get_started", "simple"}  # other pages train for longer


def code_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", TEXTS[page], re.DOTALL | re.MULTILINE)


def run(code, namespace):
    exec(code, namespace)
    for update in jax.tree.leaves(namespace.get("updates", ())):
        assert not isinstance(update, jax.Array) or jnp.isfinite(update).all()


def test_there_are_pages():
    assert {"composition", "stories", "api/estimators", "README"} <= TEXTS.keys()


@for_new_versions
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "page",
    [
        page if page in AT_ONCE else pytest.param(page, marks=pytest.mark.slow)
        for page in sorted(filter(code_blocks, TEXTS.keys() - {"stories"}))
    ],
)
def test_code_blocks_run_one_after_the_other(page):
    namespace = {}
    for code in code_blocks(page):
        run(code, namespace)


SETUP, *STORIES = code_blocks("stories")


@for_new_versions
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("code", STORIES, ids=range(1, len(STORIES) + 1))
def test_call_sites_are_short_and_stand_alone(code):
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 12
    namespace = {}
    exec(SETUP, namespace)
    run(code, namespace)


CALLS = re.findall(r"`((?:ah|optax)\.[\w.]*\([^`]*\))`", TEXTS["README"])


@pytest.mark.parametrize("call", CALLS)
def test_calls_in_the_readme_make_transformations(call):
    names = {"ah": ah, "optax": optax, "loss": ah.losses.softmax_cross_entropy}
    assert isinstance(eval(call, names), optax.GradientTransformation)


@pytest.mark.parametrize("page", TEXTS)
def test_files_and_headings_that_are_named_exist(page):
    text = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    for name in re.findall(r"`((?:tests|benchmarks|notebooks)/[\w./]*)`", text):
        assert (ROOT / name).exists(), name
    for module in re.findall(r"python -m (benchmarks[\w.]*)", TEXTS[page]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), module
    for file, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        path = (PAGES[page].parent / file).resolve() if file else PAGES[page]
        assert path.exists(), file
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
            slugs = [
                re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in titles
            ]
            assert heading in slugs, (file, heading)


def entries(kind):
    """Return the names that the reference has functions or classes for."""
    api = "\n".join(text for page, text in TEXTS.items() if page.startswith("api/"))
    return re.findall(rf"^\.\. auto{kind}:: (\S+)$", api, re.MULTILINE)


def look_up(entry):
    module, _, name = entry.rpartition(".")
    return getattr(importlib.import_module(module), name)


def defined_by(module):
    """Return the public functions and classes that a module defines itself."""
    return {
        f"{module.__name__}.{name}"
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }


@for_new_versions
def test_api_reference_is_complete():
    """Every public name has its entry, once, beside those of types and states."""
    from adahessian_jax import linen, nnx

    names = entries("function") + entries("class")
    assert len(names) == len(set(names))
    public = {f"adahessian_jax.{x}" for x in set(ah.__all__) - {"losses", "published"}}
    public.add("adahessian_jax.losses.Loss")
    for module in (ah.published, ah.losses, linen, nnx):
        public |= defined_by(module)
    assert public == set(names) - set(TEXTS["api/types"].split())


def test_table_of_estimators_is_that_of_the_benchmark():
    result = (ROOT / "benchmarks/results/estimator_accuracy.md").read_text("utf-8")
    page = TEXTS["choose_an_estimator"]
    rows = re.findall(r"^\|[^|]*\| (?:Hessian|Gauss-Newton) \|(.*)", page, re.MULTILINE)
    assert len(rows) == 7
    assert set(rows) <= set(re.findall(r"^\|[^|]*\|(.*)", result, re.MULTILINE))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_notebooks_are_committed_executed(path):
    """Every cell has run, once and in order, and none of them wrote an error."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in code]
    assert counts == list(range(1, len(code) + 1))
    for output in (o for cell in code for o in cell["outputs"]):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output["text"]


SECTIONS = ["Args", "Attributes", "Returns", "Raises", "Examples", "References"]


@for_new_versions
@pytest.mark.parametrize("entry", entries("function") + entries("class"))
def test_docstrings_have_the_house_form(entry):
    """Sections in their order, none missing, and every argument or field in them."""
    value = look_up(entry)
    text = inspect.getdoc(value)
    found = re.findall(rf"^({'|'.join(SECTIONS)}):$", text, flags=re.MULTILINE)
    assert found == sorted(found, key=SECTIONS.index)
    if inspect.isclass(value):
        described = getattr(value, "_fields", ())
        assert "Attributes" in found or not described
    else:
        described = inspect.signature(value).parameters
        of_arguments = {"Args", "Raises"} if described else set()
        assert {"Returns", "Examples"} | of_arguments <= set(found)
    for name in described:
        assert re.search(rf"^  (\*\*)?{name}: ", text, flags=re.MULTILINE), name


def test_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {ah.__version__}\n" in citation
