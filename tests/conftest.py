"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest
from pool import Pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Runs a function on several ranks; see pool.py. Its server ends with the session."""
    return Pool(tmp_path_factory.mktemp("ranks"))
