"""Files that are either complete or as they were."""

import pytest

from ds_pso.utils.atomic_io import open_atomically, write_atomically


def test_a_file_takes_the_place_of_another(tmp_path):
    path = tmp_path / "a"
    write_atomically(path, "one")
    with open_atomically(path) as file:
        file.write(b"tw")
        assert path.read_text() == "one"
        file.write("ö".encode())
    assert path.read_text(encoding="utf-8") == "twö"
    assert [found.name for found in tmp_path.iterdir()] == ["a"]


def fail_to_write(path):
    with open_atomically(path) as file:
        file.write(b"two")
        raise ZeroDivisionError


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "a"
    write_atomically(path, "one")
    with pytest.raises(ZeroDivisionError):
        fail_to_write(path)
    assert path.read_text() == "one"
