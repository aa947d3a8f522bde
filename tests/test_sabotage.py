"""The tests of the layers that are easiest to get wrong do fail when the code is broken."""

from __future__ import annotations

import pytest
from sabotage import SABOTAGES, noticed


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotage_is_noticed(name: str) -> None:
    assert noticed(name), f"no test of {SABOTAGES[name][1]} noticed"
