"""Bytes and bit rates as text."""

import pytest

from ds_pso.utils.units import as_bit_rate, as_bytes, choose_prefix, human_bytes


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (5e15, "5000.0 TB")]
)
def test_bytes_that_were_counted(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 MB"), (2.56e6, "2.56 MB"), (999.9e6, "1e+03 MB"), (1.5e9, "1.5 GB")]
)
def test_bytes_that_were_computed(count, text):
    assert as_bytes(count) == text


@pytest.mark.parametrize(("bits", "text"), [(0.5, "0.0005 kbit/s"), (1e8, "100 Mbit/s"), (1.333e9, "1.33 Gbit/s")])
def test_bit_rates(bits, text):
    assert as_bit_rate(bits) == text


def test_the_unit_of_an_axis_leaves_a_number_that_is_not_too_small():
    assert choose_prefix(1.9e6, ("G", "M", "k"), at_least=2) == (1e3, "k")
    assert choose_prefix(2e6, ("G", "M", "k"), at_least=2) == (1e6, "M")
    assert choose_prefix(0, ("G", "M", "k"), at_least=2) == (1e3, "k")
