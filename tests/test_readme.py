# SPDX-License-Identifier: Apache-2.0
"""The README's code runs as written."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adahessian_jax as ah
from tests.problems import mlp

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CALLS = re.findall(r"\| `(ah\.adahessian\(.*\))` \|", README)


@pytest.fixture(autouse=True)
def standard_promotion():
    """The README is for users with JAX's default settings."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_example_trains():
    code, *more = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 15
    namespace = {}
    exec(code, namespace)
    np.testing.assert_allclose(namespace["w"], [1.0, -2.0, 3.0], atol=0.05)
    for code in more:  # goes on with the same variables
        exec(code, namespace)
    assert namespace["state"][1].refreshes == 1


@pytest.mark.parametrize("call", re.findall(r"\| `(ah\.hutchinson.*?)`[:|, ]", README))
def test_estimators_of_the_table_can_be_made(call):
    assert isinstance(eval(call, {"ah": ah}), ah.CurvatureEstimator)


def test_names_three_published_forms():
    assert len(CALLS) == 3


@pytest.mark.parametrize("call", CALLS, ids=["official", "davda54", "zackdugue"])
@pytest.mark.filterwarnings("ignore:averaging applies to none")
def test_published_form_takes_a_step(call):
    params, loss = mlp(jnp.float32)
    tx = eval(call, {"ah": ah})
    grads = jax.grad(loss)(params)
    updates, state = tx.update(grads, tx.init(params), params, obj_fn=loss)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
    assert state[0].count == 1


def test_changelog_and_citation_name_this_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {ah.__version__}\n" in citation
