# SPDX-License-Identifier: Apache-2.0
"""The docs' code runs, what they name exists, and the API reference is complete."""

import inspect
import json
import pathlib
import re

import flax.nnx
import jax
import pytest

import adahessian_jax as ah

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Copies of the notebooks and what Sphinx builds are not pages.
PAGES = sorted(
    page
    for page in DOCS.rglob("*.md")
    if page.relative_to(DOCS).parts[0] not in ("_build", "notebooks")
)
TEXTS = {
    page.relative_to(DOCS).with_suffix("").as_posix(): page.read_text(encoding="utf-8")
    for page in PAGES
}
has_new_flax = hasattr(flax.nnx, "as_pure")
for_new_versions = pytest.mark.skipif(
    not hasattr(jax, "shard_map") or not has_new_flax,
    reason="the pages are for JAX 0.8 and Flax 0.12 or newer",
)


def test_there_are_pages():
    assert {"composition", "get_started", "api/estimators"} <= TEXTS.keys()


@for_new_versions
@pytest.mark.parametrize("page", TEXTS)
def test_code_blocks_run(page):
    namespace = {}
    with jax.numpy_dtype_promotion("standard"):
        for code in re.findall(r"```python\n(.*?)```", TEXTS[page], flags=re.DOTALL):
            exec(code, namespace)


@pytest.mark.parametrize("page", TEXTS)
def test_files_and_tests_that_are_named_exist(page):
    text = TEXTS[page]
    for name in re.findall(r"`((?:tests|benchmarks|notebooks)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"python ((?:tests|benchmarks)/[\w./]+\.py)", text):
        assert (ROOT / name).exists(), name
    for file, test in re.findall(r"`(\w+)::(test_\w+)`", text):
        source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        assert f"def {test}(" in source, (file, test)


def documented_names():
    directive = r"^\.\. auto(?:function|class):: (\S+)$"
    api = [text for page, text in TEXTS.items() if page.startswith("api/")]
    return re.findall(directive, "\n".join(api), flags=re.MULTILINE)


def public_names(module):
    """Return the public names that a module defines itself."""
    return {
        f"{module.__name__}.{name}"
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
    }


@for_new_versions
def test_api_reference_is_complete():
    """Every public name has its entry, once, and every entry is of a public name."""
    from adahessian_jax import linen, nnx

    names = documented_names()
    assert len(names) == len(set(names))
    assert set(names) == (
        {f"adahessian_jax.{name}" for name in ah.__all__}
        | public_names(nnx)
        | public_names(linen)
    )


ROWS = {
    "`gauss_newton()`": "gauss_newton",
    "`gauss_newton(n_samples=4)`": "gauss_newton n=4",
    "`hutchinson()`": "hutchinson",
    "`hutchinson(4)`": "hutchinson n=4",
    "`microbatched(hutchinson(), 8)`": "microbatched 8",
    "`hutchinson`, `low_rank_control(8)`": "low_rank_control",
    "`low_rank_control(8)`, `microbatched`, 8 parts": (
        "microbatched 8, low_rank_control"
    ),
    "`hutchinson`, `gauss_newton_control`": "gauss_newton_control",
    "`gauss_newton_control`, `microbatched`, 8 parts": (
        "microbatched 8, gauss_newton_control"
    ),
    "`optax.contrib`'s Hutchinson": "optax hutchinson",
}


@pytest.mark.parametrize("label", ROWS)
def test_table_of_estimators_is_that_of_the_benchmark(label):
    """Costs and errors on the page are the ranges in the committed result."""
    result = (ROOT / "benchmarks/results/estimator_accuracy.md").read_text("utf-8")
    small, large = [], []
    for section in result.split("\n## ")[1:]:
        row = re.search(
            rf"^\| `{re.escape(ROWS[label])}` ((?:\| [\d.]+ ){{4}})", section, re.M
        )
        if row:
            figures = [float(x) for x in row[1].split("|")[1:]]
            (large if section.startswith("large") else small).append(figures)
    assert len(small) == 4
    assert len(large) == 2

    def span(values):
        return f"{min(values):.1f} to {max(values):.1f}"

    cells = [
        span([row[0] for row in small]),
        span([row[1] for row in small]),
        span([error for row in small for error in row[2:]]),
        span([error for row in large for error in row[2:]]),
    ]
    page = TEXTS["choose_an_estimator"]
    (line,) = [x for x in page.splitlines() if x.startswith(f"| {label} |")]
    assert line.split(" | ")[2:] == [*cells[:3], f"{cells[3]} |"]


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


@pytest.mark.parametrize("name", ah.__all__)
def test_docstrings_have_the_house_form(name):
    """Sections in their order, none missing, and every argument and field in them."""
    value = getattr(ah, name)
    text = inspect.getdoc(value)
    found = re.findall(rf"^({'|'.join(SECTIONS)}):$", text, flags=re.MULTILINE)
    assert found == sorted(found, key=SECTIONS.index)
    if inspect.isclass(value):
        expected = {"Attributes"}
        entries = getattr(value, "_fields", ())
        if value is ah.CurvatureEstimator:  # those of optax's type are init and update
            entries = value.__annotations__
    else:
        expected = {"Args", "Returns", "Raises", "Examples"}
        entries = inspect.signature(value).parameters
    assert expected <= set(found)
    for entry in entries:
        assert re.search(rf"^  {entry}: ", text, flags=re.MULTILINE), entry
