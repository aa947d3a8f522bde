"""A folder at an address that fsspec knows, such as ``s3://bucket/run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_SHAPE = "must be an address that fsspec knows, such as s3://bucket/run or gs://bucket/run"


def check_address(address: str) -> None:
    """Raise ValueError unless it is one whose library is installed. Nothing is asked over the network."""
    scheme, colon, path = address.partition("://")
    if not (scheme and colon and path.strip("/")):
        raise ValueError(_SHAPE)
    if set(path) & set("*?["):
        raise ValueError("must hold none of * ? [, which fsspec would take for a pattern of several folders")
    try:
        import fsspec

        fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        raise ValueError(_SHAPE) from error
    except ImportError as error:
        raise ValueError(
            f'must have its library installed ({error}): pip install "ds_pso[remote]" for s3://, gcsfs for gs://'
        ) from error


class RemoteFolder:
    """Files by their names in the folder, with slashes. Errors are those of the library: OSError, or its own.

    For the thread that makes it. The library repeats requests that fail.
    """

    def __init__(self, address: str) -> None:
        import fsspec  # most runs need none

        # An instance of its own: fsspec would keep one for every thread that has ever asked.
        options: dict[str, Any] = {"skip_instance_cache": True}
        if address.partition("://")[0] in ("file", "local"):
            options["auto_mkdir"] = True  # object stores have no folders to make
        self.address = address.rstrip("/")
        self._files, path = fsspec.core.url_to_fs(self.address, **options)
        self._path = path.rstrip("/")

    def names(self) -> list[str]:
        """Return the names of what lies directly in it; of a folder that is not there, none."""
        self._files.invalidate_cache()
        try:
            found = self._files.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        content: bytes = self._files.cat_file(self._at(name))
        return content

    def write(self, name: str, content: bytes) -> None:
        """Replace the content of a file: at once, where the store does so."""
        self._files.pipe_file(self._at(name), content)

    def put(self, source: Path, name: str) -> None:
        """Copy a local file to it."""
        self._files.put_file(str(source), self._at(name))

    def get(self, name: str, target: Path) -> None:
        """Copy a file from it."""
        self._files.get_file(self._at(name), str(target))

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it."""
        self._files.rm(self._at(name), recursive=True)

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"
