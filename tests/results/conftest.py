"""The suite of tasks, for every test of results."""

from __future__ import annotations

import pytest

from mohd_train.results.suite import Suite, load_suite


@pytest.fixture(scope="session")
def suite() -> Suite:
    return load_suite()
