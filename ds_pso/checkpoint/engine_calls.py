"""``engine.save_checkpoint`` and ``engine.load_checkpoint`` of a script, for several particles.

Each would write files of the same names into one folder. So each has a folder of its own in it, and with DeepSpeed's
files lies what the swarm needs to go on.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ds_pso.checkpoint.loading import check_part, restore_part
from ds_pso.checkpoint.saving import save_part
from ds_pso.errors import CheckpointError, ConfigError
from ds_pso.session.session import Session

_Loaded = tuple[str | None, Any]


class EngineCheckpoints:
    """Wraps the two calls of one engine. A path that names the particle's folder already is left as it is."""

    def __init__(self, session: Session, engine: Any) -> None:
        self._session = session
        self._engine = engine
        self._warned = False
        self._save, self._load = engine.save_checkpoint, engine.load_checkpoint
        engine.save_checkpoint, engine.load_checkpoint = self.save_checkpoint, self.load_checkpoint

    def save_checkpoint(self, save_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Do what the engine's does, in ``save_dir/particle_<i>``, and add the swarm's part. Called on all ranks."""
        session = self._session
        own = self._own(save_dir)
        if own is None:
            return self._save(save_dir, tag, *args, **kwargs)
        if session.is_leader and not self._warned:
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
        """Do what the engine's does, from ``load_dir/particle_<i>`` if ``save_checkpoint`` has made one.

        A checkpoint of plain DeepSpeed, or one of which only a part is loaded, is a new beginning: all particles take
        the weights of particle 0.

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
        """Return the particle's folder; None if that is named already."""
        own = self._session.world.layout.particle_folder(Path(folder))
        return None if own == Path(folder) else own

    def _find(self, own: Path, tag: str | None) -> Path | None:
        """Return the folder to load; None: the particles have no folders of their own."""
        with self._session.world.coordinator.agree("looking for the checkpoint"):
            if not list(own.parent.glob("particle_*")):
                return None
            try:
                folder = own / (str(tag) if tag is not None else (own / "latest").read_text().strip())
            except OSError as error:
                raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}); name a tag") from error
            if not folder.is_dir():
                raise CheckpointError(f"{folder}: missing; check the path and the tag, or start without resuming")
            return folder
