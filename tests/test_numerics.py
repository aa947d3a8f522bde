"""The final weights of every sync mode are those on record; on another machine, what must hold there, too."""

from __future__ import annotations

import json

import numerics
import pytest
from pool import Pool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

AGAIN = [
    numerics.Case("local_sgd", 0, "fp32"),
    numerics.Case("pso", 2, "int4"),
    numerics.Case("diloco", 2, "streaming"),
    numerics.Case("swarm", 3, "fp32"),
    numerics.Case("nosync", 3, "delay2"),
]


@pytest.fixture(scope="module")
def found(pool: Pool) -> dict[str, numerics.Found]:
    return numerics.run(pool)


def test_the_numbers_are_those_on_record(found: dict[str, numerics.Found]) -> None:
    record = json.loads(numerics.RECORD.read_text(encoding="utf-8"))
    refused = {name for name, value in record["hashes"].items() if value == numerics.REFUSED}
    assert record["hashes"].keys() == found.keys()
    assert refused == {name for name, case in found.items() if case.hash == numerics.REFUSED}
    if record["machine"] != numerics.machine():
        pytest.skip("recorded on another machine, where sums may be rounded otherwise")
    assert {name: case.hash for name, case in found.items()} == record["hashes"]


def test_the_ranks_of_a_particle_agree(found: dict[str, numerics.Found]) -> None:
    for name, case in found.items():
        for start in range(0, len(case.parameters), numerics.SIZE):
            assert len({*case.parameters[start : start + numerics.SIZE]}) == 1, name


def test_particles_are_equal_after_an_average(found: dict[str, numerics.Found]) -> None:
    for stage in numerics.STAGES:
        assert len({*found[f"local_sgd/zero{stage}/fp32"].parameters}) == 1


def test_a_second_run_gives_the_same_numbers(pool: Pool, found: dict[str, numerics.Found]) -> None:
    for name, case in numerics.run(pool, AGAIN).items():
        assert case == found[name], name
