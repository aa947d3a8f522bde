"""A callback and an environment that let a Lightning ``Trainer`` under DeepSpeed train a particle."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from ds_pso import checkpoint
from ds_pso.errors import CheckpointError, ConfigError, UnsupportedError
from ds_pso.sampler import SwarmSampler
from ds_pso.swarm import Swarm

if TYPE_CHECKING:
    from lightning.fabric.plugins import ClusterEnvironment
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary
    from lightning.pytorch.strategies import DeepSpeedStrategy
else:
    # One library under two names, whose classes differ: the one that the script has imported.
    _PYTORCH, _FABRIC = "lightning.pytorch", "lightning.fabric"
    if "pytorch_lightning" in sys.modules and _PYTORCH not in sys.modules:
        _PYTORCH, _FABRIC = "pytorch_lightning", "lightning_fabric"
    try:
        Callback = importlib.import_module(_PYTORCH).Callback
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}; ds_pso.lightning needs it: pip install "ds_pso[lightning]"') from error
    ClusterEnvironment = importlib.import_module(f"{_FABRIC}.plugins").ClusterEnvironment
    DeepSpeedStrategy = importlib.import_module(f"{_PYTORCH}.strategies").DeepSpeedStrategy
    ModelCheckpoint = importlib.import_module(f"{_PYTORCH}.callbacks").ModelCheckpoint
    ModelSummary = importlib.import_module(f"{_PYTORCH}.callbacks").ModelSummary


class SwarmEnvironment(ClusterEnvironment):
    """The ranks of a particle: ``DeepSpeedStrategy(cluster_environment=SwarmEnvironment(swarm), ...)``.

    A rank's device is that of its number on the machine, so several particles may share one; leave the Trainer's
    ``devices`` as they are.

    Args:
        swarm: what ``ds_pso.init`` returned, before the Trainer was made.
    """

    def __init__(self, swarm: Swarm) -> None:
        self._layout = swarm.world.layout

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        return int(os.environ["MASTER_PORT"])

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._layout.particle_size

    def set_world_size(self, size: int) -> None:
        """Do nothing: the launcher and the JSON have set it."""

    def global_rank(self) -> int:
        return self._layout.shard_rank

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: the launcher and the JSON have set it."""

    def local_rank(self) -> int:
        return int(os.environ["LOCAL_RANK"])

    def node_rank(self) -> int:
        return int(os.environ.get("GROUP_RANK", 0))


class SwarmCallback(Callback):
    """``Trainer(callbacks=[SwarmCallback(swarm)], ...)`` makes the LightningModule a particle of the swarm.

    Validation inside ``fit`` sees the consensus of the particles. Lightning's checkpoints, of which each particle has
    its own, hold the swarm's part, too, and are checked before they are loaded. Particle 0 alone has loggers and a
    progress bar.

    For that it wraps ``save_checkpoint`` of the Trainer and ``load_checkpoint`` of its strategy.

    Args:
        swarm: what ``ds_pso.init`` returned, before the Trainer was made.
        export: folder for the model that the particles agree on, written at the end of training; None: it is not.
        validate_consensus: false to let each particle validate its own weights; the consensus costs an exchange, and
            two copies of the shard in memory.

    Raises:
        ConfigError: by ``fit``, if the Trainer is set up in a way that the swarm cannot follow.
        CheckpointError: by ``fit``, if ``ckpt_path`` names no checkpoint of this particle, or a damaged one.
    """

    def __init__(
        self, swarm: Swarm, *, export: str | os.PathLike[str] | None = None, validate_consensus: bool = True
    ) -> None:
        self.swarm = swarm
        self._export = export
        self._validates_consensus = validate_consensus
        self._consensus: AbstractContextManager[None] | None = None  # entered while validation runs
        # For who forgets SwarmEnvironment, until ``setup`` asks for it: under any launcher Lightning then reads the
        # particle's ranks, and does not wait for others that it has counted itself.
        os.environ.setdefault("TORCHELASTIC_RUN_ID", "ds_pso")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        _check_supported(self.swarm, trainer)
        self.swarm.session.has_trainer = True
        trainer.save_checkpoint = self._saving(trainer, trainer.save_checkpoint)
        trainer.strategy.load_checkpoint = self._loading(trainer.strategy.load_checkpoint)
        if self.swarm.particle > 0:
            trainer.loggers = []
            trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, ModelSummary)]
            if trainer.progress_bar_callback is not None:
                trainer.progress_bar_callback.disable()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join with the engine, which is there now; a checkpoint is loaded after this."""
        swarm = self.swarm
        trainer.fit_loop.setup_data()  # otherwise done after a checkpoint was loaded, which asks for the sampler
        steps = trainer.estimated_stepping_batches
        if swarm.config.total_steps is None and isinstance(steps, int):
            swarm.config = swarm.config.model_copy(update={"total_steps": steps})
        _check_data(swarm, trainer.train_dataloader)
        swarm.attach(trainer.strategy.deepspeed_engine)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validates_consensus and trainer.state.fn == "fit" and not trainer.sanity_checking:
            with torch.inference_mode(False), torch.no_grad():
                self._consensus = self.swarm.consensus()
                self._consensus.__enter__()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._consensus is not None:
            consensus, self._consensus = self._consensus, None
            with torch.inference_mode(False), torch.no_grad():
                consensus.__exit__(None, None, None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.swarm.finish_pending()
        if self._export is not None:
            self.swarm.export(Path(self._export))

    def _saving(self, trainer: Trainer, save_checkpoint: Callable[..., None]) -> Callable[..., None]:
        """Wrap ``Trainer.save_checkpoint``: the swarm's part is added."""

        def save(filepath: str | os.PathLike[str], weights_only: bool | None = None, *args: Any, **kwargs: Any) -> None:
            folder = self._own(filepath, "trainer.save_checkpoint")
            save_checkpoint(filepath, weights_only, *args, **kwargs)
            if not weights_only:
                checkpoint.save_part(self.swarm.session, folder)

        return save

    def _loading(self, load_checkpoint: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """Wrap the strategy's ``load_checkpoint``: all files are checked before, and the swarm's part is restored."""

        def load(path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
            folder = self._own(path, "ckpt_path")
            loaded: dict[str, Any] = {}
            checkpoint.check_part(self.swarm.session, folder)
            checkpoint.load_part(
                self.swarm.session, folder, load=lambda: loaded.update(load_checkpoint(path, *args, **kwargs))
            )
            return loaded

        return load

    def _own(self, path: str | os.PathLike[str], what: str) -> Path:
        """Return the path, which must be the same for all particles but for the folder of each."""
        layout, folder = self.swarm.world.layout, Path(path)
        own = f"particle_{layout.particle}"
        with self.swarm.world.coordinator.agree("the place of a checkpoint"):
            if layout.num_particles > 1 and own not in folder.parts:
                raise CheckpointError(
                    f"{what} = {path}: particle {layout.particle} writes and reads below a folder {own}; give each "
                    "particle a path with its own, as from swarm.world.layout.particle_folder(...)"
                )
        names = sorted(set(self.swarm.world.coordinator.gather("the name of a checkpoint", folder.name)))
        if len(names) > 1:
            raise CheckpointError(
                f"{what}: the particles have chosen different checkpoints, {' and '.join(names)}; name them by the "
                "step, and monitor what is the same for all particles, as a validation of the consensus",
                agreed=True,
            )
        return folder


def _check_supported(swarm: Swarm, trainer: Trainer) -> None:
    if not isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"SwarmCallback: Trainer(strategy={type(trainer.strategy).__name__}): a particle is a DeepSpeed job; use "
            "DeepSpeedStrategy(config=swarm.ds_config, cluster_environment=SwarmEnvironment(swarm))"
        )
    if not isinstance(trainer.strategy.cluster_environment, SwarmEnvironment):
        raise ConfigError(
            "SwarmCallback: Lightning's own cluster environment does not know the particles; give "
            "DeepSpeedStrategy(config=swarm.ds_config, cluster_environment=SwarmEnvironment(swarm))"
        )
    if swarm.config.remote_checkpoints is not None:
        raise ConfigError(
            "SwarmCallback: swarm.remote_checkpoints: Lightning writes its own checkpoints, which are not uploaded; "
            "remove it, and copy their folder"
        )
    if trainer._accelerator_connector.use_distributed_sampler:
        raise ConfigError(
            "SwarmCallback: Trainer(use_distributed_sampler=True) would shard the data over one particle only; set it "
            "to False, and give the training loader sampler=swarm.sampler(dataset, batch_size=...)"
        )
    if swarm.num_particles == 1:
        return
    if len(swarm.world.membership.reachable()) < swarm.num_particles:
        raise UnsupportedError(
            'SwarmCallback: swarm.transport = "elastic": Lightning counts its own steps, and a particle that joins '
            'late would train on after the others; use "static"',
            agreed=True,
        )
    for callback in trainer.checkpoint_callbacks:
        if (
            isinstance(callback, ModelCheckpoint)
            and f"particle_{swarm.particle}" not in Path(callback.dirpath or "").parts
        ):
            raise ConfigError(
                f"SwarmCallback: ModelCheckpoint(dirpath={callback.dirpath!r}): every particle has checkpoints of its "
                'own; give dirpath=swarm.world.layout.particle_folder(Path("checkpoints")), or '
                "Trainer(enable_checkpointing=False)"
            )


def _check_data(swarm: Swarm, loaders: object) -> None:
    """Refuse training data that is the same for several particles."""
    if swarm.num_particles == 1:
        return
    many = (
        loaders.values() if isinstance(loaders, dict) else loaders if isinstance(loaders, list | tuple) else [loaders]
    )
    for loader in many:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            continue
        sampler = loader.sampler
        ranks = sampler.num_replicas if isinstance(sampler, DistributedSampler) else 0
        if not isinstance(sampler, SwarmSampler) and ranks != swarm.session.num_data_ranks:
            raise ConfigError(
                f"SwarmCallback: the training loader has a {type(sampler).__name__}, so that all particles would train "
                "on the same samples; give it sampler=swarm.sampler(dataset, batch_size=...)"
            )
