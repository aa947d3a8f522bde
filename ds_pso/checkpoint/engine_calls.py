"""``engine.save_checkpoint`` and ``engine.load_checkpoint`` of a script, for a swarm with sync points.

With DeepSpeed's files lies what the swarm needs to go on. Several particles would write files of the same names into
one folder, so each has a folder of its own in it.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from pathlib import Path
from typing import Any

from ds_pso.checkpoint.loading import check_part, restore_part
from ds_pso.checkpoint.saving import save_part
from ds_pso.errors import CheckpointError, ConfigError
from ds_pso.session.session import Session
from ds_pso.shards.complete_checkpoint import all_in_its_files, leaves_something_out

_Loaded = tuple[str | None, Any]


def complete_checkpoints(engine: Any) -> None:
    """Let the two calls of an engine save and load what DeepSpeed's own leave out, if they do.

    A checkpoint of plain DeepSpeed, with its swap files, is loaded as DeepSpeed loads it.
    """
    if not leaves_something_out(engine):
        return
    save, load = engine.save_checkpoint, engine.load_checkpoint

    @functools.wraps(save)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        with all_in_its_files(engine, loads=False):
            return save(*args, **kwargs)

    @functools.wraps(load)
    def load_checkpoint(load_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> _Loaded:
        latest = Path(load_dir) / "latest"
        name = latest.read_text().strip() if tag is None and latest.is_file() else tag
        is_plain = name is not None and (Path(load_dir) / str(name) / "offloaded_tensors").is_dir()
        with contextlib.nullcontext() if is_plain else all_in_its_files(engine, loads=True):
            loaded: _Loaded = load(load_dir, tag, *args, **kwargs)
        return loaded

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint


class EngineCheckpoints:
    """Wraps the two calls of one engine.

    Left as they are: calls for a path that names the particle's folder already; and those of a Trainer, or Accelerate,
    that trains the only particle.
    """

    def __init__(self, session: Session, engine: Any) -> None:
        self._session = session
        self._engine = engine
        self._warned = False
        self._save, self._load = engine.save_checkpoint, engine.load_checkpoint
        engine.save_checkpoint, engine.load_checkpoint = self.save_checkpoint, self.load_checkpoint

    def save_checkpoint(self, save_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Do what the engine's does, and add the swarm's part. Called on all ranks.

        Several particles write into ``save_dir/particle_<i>``.
        """
        session = self._session
        own = self._own(save_dir)
        if own is None:
            return self._save(save_dir, tag, *args, **kwargs)
        if session.is_leader and session.num_particles > 1 and not self._warned:
            warnings.warn(
                f"engine.save_checkpoint: each particle has a folder of its own, {own} and so on; resume with "
                "engine.load_checkpoint after swarm.attach. swarm.save writes all of them as one, or none",
                stacklevel=2,
            )
            self._warned = True
        tag = f"global_step{self._engine.global_steps}" if tag is None else str(tag)
        result = self._save(str(own), tag, *args, **kwargs)
        save_part(session, own / tag)
        return result

    def load_checkpoint(self, load_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> _Loaded:
        """Do what the engine's does, and restore the swarm's part, from where ``save_checkpoint`` has put it.

        A checkpoint of plain DeepSpeed, or one of which only a part is loaded, is a new beginning: all particles take
        the weights of particle 0, and the rule begins there.

        Raises:
            CheckpointError: it is damaged, or of another swarm.
            ConfigError: the swarm is elastic.
        """
        session = self._session
        own = self._own(load_dir)
        if own is None or session.loads_engine:
            return self._load(load_dir, tag, *args, **kwargs)
        if session.world.membership.can_fail:
            raise ConfigError("engine.load_checkpoint: an elastic swarm resumes with swarm.load; use that")
        folder = self._find(own, tag)
        partly = len(args) > 1 or kwargs.get("load_module_only") or kwargs.get("load_optimizer_states") is False
        if folder is not None and not partly:
            check_part(session, folder)
        loaded: _Loaded = self._load(str(own if folder else load_dir), folder.name if folder else tag, *args, **kwargs)
        if loaded[0] is not None:
            if folder is not None and not partly:
                restore_part(session, folder)
            elif session.synchronizer is not None:
                session.synchronizer.start(session.window, session.step)
        return loaded

    def _own(self, folder: str) -> Path | None:
        """Return the folder for the particle's files; None: somebody else adds the swarm's part."""
        session, given = self._session, Path(folder)
        own = session.world.layout.particle_folder(given)
        if own == given or (session.num_particles == 1 and session.has_trainer):
            return None
        return own if session.num_particles > 1 else given

    def _find(self, own: Path, tag: str | None) -> Path | None:
        """Return the folder to load; None: nothing of the swarm is there."""
        session = self._session
        with session.world.coordinator.agree("looking for the checkpoint"):
            if session.num_particles == 1:
                return self._find_only(own, tag)
            if not list(own.parent.glob("particle_*")):
                return None
            try:
                folder = own / (str(tag) if tag is not None else (own / "latest").read_text().strip())
            except OSError as error:
                raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}); name a tag") from error
            if not folder.is_dir():
                raise CheckpointError(f"{folder}: missing; check the path and the tag, or start without resuming")
            return folder

    def _find_only(self, folder: Path, tag: str | None) -> Path | None:
        """``_find`` for one particle, whose checkpoint may be one of plain DeepSpeed."""
        latest = folder / "latest"
        if tag is None and not latest.is_file():
            return None
        found = folder / (latest.read_text().strip() if tag is None else str(tag))
        if (found / "swarm").is_dir():
            return found
        if self._session.is_leader and found.is_dir():
            warnings.warn(
                f"engine.load_checkpoint: {found} holds nothing of the swarm: {self._session.config.sync_mode} begins "
                "anew, with the weights in it",
                stacklevel=5,
            )
        return None
