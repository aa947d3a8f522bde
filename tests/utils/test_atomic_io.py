"""Files are either complete or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_pso.utils.atomic_io import hash_file, replacing_file, write_atomically


def test_the_new_file_takes_the_place_of_the_old_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    write_atomically(path, "old")
    with replacing_file(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_one_is_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    write_atomically(path, "old")

    def fail() -> None:
        with replacing_file(path) as temporary:
            temporary.write_text("ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    with pytest.raises(FileNotFoundError), replacing_file(path):
        pass  # nothing was written
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_hashes_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert hash_file(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
