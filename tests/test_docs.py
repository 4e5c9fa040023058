# SPDX-License-Identifier: Apache-2.0
"""The code in docs/ runs as written, and the tests that it names exist."""

import pathlib
import re

import flax.nnx
import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}


def test_there_are_pages():
    assert "composition" in TEXTS


@pytest.mark.skipif(
    not hasattr(jax, "shard_map") or not hasattr(flax.nnx, "as_pure"),
    reason="the pages are for JAX 0.8 and Flax 0.12 or newer",
)
@pytest.mark.parametrize("page", TEXTS)
def test_code_blocks_run(page):
    namespace = {}
    with jax.numpy_dtype_promotion("standard"):
        for code in re.findall(r"```python\n(.*?)```", TEXTS[page], flags=re.DOTALL):
            exec(code, namespace)


@pytest.mark.parametrize("page", TEXTS)
def test_files_and_tests_that_are_named_exist(page):
    text = TEXTS[page]
    for name in re.findall(r"`((?:tests|benchmarks)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name
    for file, test in re.findall(r"`(\w+)::(test_\w+)`", text):
        source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        assert f"def {test}(" in source, (file, test)
