"""Sequence and tensor parallelism in the config: sizes, and what they divide."""

from __future__ import annotations

from typing import Any

import pytest

from ds_pso.config.parallelism import check_divides, ranks_per_sample
from ds_pso.errors import ConfigError


@pytest.mark.parametrize(
    ("config", "ranks"),
    [
        ({}, 1),
        ({"sequence_parallel_size": 4}, 4),
        ({"tensor_parallel": {}}, 1),
        ({"tensor_parallel": {"autotp_size": 0}}, 1),  # DeepSpeed's default: it is off
        ({"tensor_parallel": {"autotp_size": 2}}, 2),
        ({"sequence_parallel_size": 3, "tensor_parallel": {"autotp_size": 2}}, 6),
    ],
)
def test_the_ranks_of_a_sample(config: dict[str, Any], ranks: int) -> None:
    assert ranks_per_sample(config) == ranks


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"sequence_parallel_size": 0}, "sequence_parallel_size = 0: must be a whole number of at least 1"),
        ({"sequence_parallel_size": "2"}, "sequence_parallel_size = '2': must be a whole number of at least 1"),
        ({"sequence_parallel_size": True}, "sequence_parallel_size = True: must be a whole number"),
        ({"tensor_parallel": {"autotp_size": -1}}, "tensor_parallel.autotp_size = -1: must be a whole number of at"),
        ({"sequence_parallel_size": 3}, "sequence_parallel_size = 3: does not divide the 4 ranks of a particle"),
        ({"tensor_parallel": {"autotp_size": 8}}, "tensor_parallel.autotp_size = 8: does not divide the 4 ranks"),
    ],
)
def test_sizes_that_cannot_be(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_divides(config, particle_size=4)
    assert text in str(caught.value)


def test_a_particle_of_one_rank_divides_nothing() -> None:
    check_divides({"tensor_parallel": {"autotp_size": 1}}, particle_size=1)
