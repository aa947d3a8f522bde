"""A folder that one process at a time writes into. The kernel releases the lock when that ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
import weakref
from pathlib import Path

from ds_pso.errors import ConfigError

log = logging.getLogger(__name__)

NAME = ".lock"
_LOOK_S = 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # on this file system

_held: weakref.WeakValueDictionary[tuple[int, int], FolderLock] = weakref.WeakValueDictionary()


def lock_folder(folder: Path, patience_s: float = 5.0) -> FolderLock:
    """Lock a folder, which is made if missing. A process may lock one several times, as runs in it follow each other.

    Args:
        patience_s: how long another process may hold it: one that was killed may take a moment to go, and the next
            attempt begins at once.

    Raises:
        ConfigError: another process holds it, and names that.
        OSError: the folder cannot be written.
    """
    with contextlib.suppress(OSError):
        held = _held.get(_identity((folder / NAME).stat()))
        if held is not None:
            held.users += 1
            return held
    return FolderLock(folder, patience_s)


class FolderLock:
    """Made by ``lock_folder``; held until ``release``, until nobody refers to it, or to the end of the process.

    Attributes:
        users: how often this process has locked it.
    """

    def __init__(self, folder: Path, patience_s: float) -> None:
        self.users = 1
        self._folder, self._patience_s = folder, patience_s
        self._made = not folder.exists()
        self._take()

    def _take(self) -> None:
        self.file = _open_locked(self._folder, self._patience_s)
        self._let_go = weakref.finalize(self, _let_go, self._folder, self.file, os.getpid())
        if self.file is not None:
            _held[_identity(os.fstat(self.file))] = self

    def release(self) -> None:
        """Let others have it, unless this process has locked it once more; what was made for it is removed if empty."""
        self.users -= 1
        if self.users == 0:
            self._drop()
            self._let_go()
            if self._made:
                with contextlib.suppress(OSError):
                    self._folder.rmdir()

    def renamed(self, to: Path) -> None:
        """Lock the folder of the old name anew, after that which was there was renamed.

        Raises:
            ConfigError: another process was faster.
        """
        before = self.file
        self._drop()
        self._let_go.detach()
        try:
            self._made = False
            self._take()
        finally:
            _let_go(to, before, os.getpid())

    def _drop(self) -> None:
        if self.file is not None:
            _held.pop(_identity(os.fstat(self.file)), None)

    def forget(self) -> None:
        """In a process that was forked: the lock is not its own, and must not outlive its parent because of it."""
        self._let_go.detach()
        if self.file is not None:
            os.close(self.file)


def _open_locked(folder: Path, patience_s: float) -> int | None:
    """Return the file that is locked; None where there are no locks."""
    give_up = time.monotonic() + patience_s
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, folder / NAME):  # else it was renamed or removed meanwhile
                holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
                os.ftruncate(file, 0)
                os.write(file, json.dumps(holder).encode())
                return file
        except BlockingIOError as error:
            if time.monotonic() > give_up:
                holder_text = _describe_holder(file)
                os.close(file)
                raise ConfigError(
                    f"{folder}: another run writes into this folder ({holder_text}); wait until it has ended, or give "
                    "another run_dir (train.py: --output_dir)"
                ) from error
            time.sleep(_LOOK_S)
        except OSError as error:
            os.close(file)
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("%s: cannot be locked (%s); a second run in it would not be noticed", folder, error.strerror)
            return None
        os.close(file)


def _describe_holder(file: int) -> str:
    try:
        holder = json.loads(os.pread(file, 4096, 0))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is writing it just now
        return "a process that has just begun"


def _let_go(folder: Path, file: int | None, owner: int) -> None:
    if file is None or os.getpid() != owner:
        return
    with contextlib.suppress(OSError):
        if _is_at(file, folder / NAME):
            (folder / NAME).unlink()
    with contextlib.suppress(OSError):
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        return _identity(path.stat()) == _identity(os.fstat(file))
    except FileNotFoundError:
        return False


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _forget_in_child() -> None:
    for lock in list(_held.values()):
        lock.forget()
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
