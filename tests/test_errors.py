"""Errors are one line, and know whether all ranks agree on them."""

import pytest

from ds_pso.errors import CheckpointError, ConfigError, PeerError, SwarmError, UnsupportedError

KINDS = [SwarmError, ConfigError, UnsupportedError, PeerError, CheckpointError]


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_is_one_line(kind):
    assert str(kind("  a\n  b\t c\r\n")) == "a b c"


@pytest.mark.parametrize("kind", KINDS)
def test_all_are_caught_as_swarm_error(kind):
    with pytest.raises(SwarmError):
        raise kind("x")


@pytest.mark.parametrize(
    ("kind", "agreed"),
    [(SwarmError, False), (ConfigError, True), (UnsupportedError, False), (PeerError, False), (CheckpointError, False)],
)
def test_whether_one_rank_may_speak_for_all(kind, agreed):
    assert kind("x").agreed is agreed
    assert kind("x", agreed=not agreed).agreed is not agreed
    assert kind("x").agreed is agreed, "one error must not change the others"


def test_a_config_error_is_also_a_value_error():
    assert issubclass(ConfigError, ValueError)
