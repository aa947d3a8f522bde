"""A search among the models of the particles as they are: each is an expert; see ``ds_pso.search``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ds_pso.comm.exchange import fill
from ds_pso.errors import ConfigError, SwarmError, UnsupportedError
from ds_pso.search.evaluator import Evaluator, score_references
from ds_pso.search.record import NAME, Evaluation, Record
from ds_pso.search.registry import make_options, make_searcher
from ds_pso.search.result import SearchResult, conclude
from ds_pso.search.space import BlockKind, Coefficients, Space, find_blocks
from ds_pso.session.session import Session
from ds_pso.shards import replace as replace_all
from ds_pso.shards.engine import num_stages
from ds_pso.sync.buffers import average
from ds_pso.sync.parts import SyncParts
from ds_pso.utils.strict_model import StrictModel

Score = Callable[[], float]


@dataclass(frozen=True)
class ExpertSearch:
    """The settings of a search; see ``Swarm.search``."""

    score: Score
    test: Score | None = None
    searcher: str = "pso"
    options: Mapping[str, object] = field(default_factory=dict)
    blocks: BlockKind = "layers"
    evaluations: int = 200
    seed: int = 0
    higher_is_better: bool = False
    noisy_score: bool = False
    resume: bool = False


class ParticleModels:
    """The experts: each particle keeps its own weights, and any combination of all can be made the model of each.

    A combination is one weighted sum over the particles, shard by shard, so that no rank ever holds the shard of
    another particle. What is not trained, such as the base under an adapter, stays what it is.
    """

    def __init__(self, session: Session, parts: SyncParts) -> None:
        parts.world.background.settle()
        parts.shards.zero_padding()
        self._session, self._parts = session, parts
        self._own = [t.clone() for t in parts.shards.tensors]
        with parts.shards.flat_buffers() as buffers:
            self._own_buffers = [buffer.clone() for buffer in buffers]
            if buffers:
                average(parts.exchange, buffers, (1 / session.num_particles,) * session.num_particles)

    def check_finite(self) -> None:
        """Raise SwarmError if an expert has weights that are not finite: they would be in every combination."""
        finite = all(bool(t.isfinite().all()) for t in self._own)
        mine = min(row[0] for row in self._parts.world.local.gather([float(finite)]))
        broken = [i for i, row in enumerate(self._parts.exchange.all_gather([mine])) if not row[0]]
        if broken:
            raise SwarmError(
                f"swarm.search: the weights of particle {', '.join(map(str, broken))} are not finite, and would be in "
                "every combination; load an older checkpoint",
                agreed=True,
            )

    def digests(self) -> list[str]:
        """Return a hash of the weights of each rank, on every rank."""
        found = hashlib.sha256()
        for t in self._own:
            found.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return self._session.world.coordinator.gather("the experts", found.hexdigest()[:16])

    @torch.no_grad()
    def compose(self, space: Space, c: Coefficients) -> None:
        """Make a combination the model of every particle. Called alike on all ranks."""
        shards, exchange = self._parts.shards, self._parts.exchange
        row = space.weights(c)[exchange.particle]
        factors = {name: w for names, w in zip(space.blocks.values(), row.tolist(), strict=True) for name in names}
        for t, own in zip(shards.tensors, self._own, strict=True):
            t.copy_(own)
        for s in shards.segments:
            shards.tensors[s.shard][s.shard_start : s.shard_start + s.numel].mul_(factors[s.name])
        fill(shards.tensors, exchange.weighted_mean(shards.tensors, (1.0,) * exchange.num_particles))
        shards.publish()

    def give_back(self) -> None:
        """Let each particle be its own expert again. Called alike on all ranks."""
        shards = self._parts.shards
        with shards.flat_buffers() as buffers:
            replace_all([*shards.tensors, *buffers], [*self._own, *self._own_buffers])
        shards.publish()

    def score(self, function: Score, label: str) -> float:
        """Return the mean of what the function returns on all ranks of the swarm, the same bits on each."""
        session, parts = self._session, self._parts
        module = session.engine.module
        was_training, value = module.training, 0.0
        module.eval()
        try:
            with session.world.coordinator.agree(label), torch.no_grad():
                value = float(function())
        finally:
            module.train(was_training)
        rows = parts.world.local.gather([value])
        table = parts.exchange.all_gather([sum(row[0] for row in rows) / len(rows)])
        return sum(row[0] for row in table) / len(table)


def search(session: Session, settings: ExpertSearch) -> SearchResult:
    """Search, and leave every particle with the best model; see ``Swarm.search``."""
    parts = _parts_of(session)
    with parts.shards.mapped():
        return _search(session, parts, settings)


def _search(session: Session, parts: SyncParts, settings: ExpertSearch) -> SearchResult:
    options = make_options(settings.searcher, settings.options)
    least = session.num_particles + 2
    if settings.evaluations < least:
        raise ConfigError(
            f"swarm.search evaluations = {settings.evaluations}: must be at least {least}: the particles, the first of "
            "them twice, and their mean"
        )
    models = ParticleModels(session, parts)
    try:
        return _search_among(models, session, parts, settings, options)
    except SwarmError as error:
        if error.agreed:  # the particles hold some combination; another search would take that for all experts
            models.give_back()
        raise


def _search_among(
    models: ParticleModels, session: Session, parts: SyncParts, settings: ExpertSearch, options: StrictModel
) -> SearchResult:
    models.check_finite()
    trained = parts.shards.trained_names()
    shapes = {p.name: tuple(getattr(p.like, "ds_shape", p.like.shape)) for p in parts.shards.whole if p.name in trained}
    names = tuple(f"particle_{i}" for i in range(session.num_particles))
    space = Space(names, find_blocks(shapes, settings.blocks))
    searcher = make_searcher(settings.searcher, space, settings.seed, options)
    record = _open(session, settings, models, options.model_dump())

    def scored(function: Score, label: str) -> Callable[[Coefficients], float]:
        def of(c: Coefficients) -> float:
            models.compose(space, c)
            return models.score(function, label)

        return of

    evaluator = Evaluator(
        record,
        scored(settings.score, "the score of swarm.search"),
        settings.evaluations,
        higher_is_better=settings.higher_is_better,
        on_evaluation=lambda evaluation, best: session.log(
            "search", by=evaluation.by, score=evaluation.score, best=best
        ),
    )
    score_references(evaluator, space, noisy=settings.noisy_score)
    evaluator.run(searcher)
    test = None if settings.test is None else scored(settings.test, "the test of swarm.search")
    result = conclude(evaluator, record, space, test)
    assert evaluator.best is not None
    models.compose(space, evaluator.best.coefficients)
    parts.start_state()
    session.is_merged = True
    return result if session.run_dir else replace(result, record=None)


def _parts_of(session: Session) -> SyncParts:
    session.engine  # noqa: B018 (raises without one)
    if session.synchronizer is None or session.num_particles == 1:
        raise ConfigError("swarm.search: there is one particle, and nothing to combine; set swarm.particles")
    if num_stages(session.engine) > 1:
        raise UnsupportedError(
            "swarm.search: the stages of a pipeline hold layers of their own, and do not agree on the blocks of the "
            "model; export the particles, and use ds-pso search",
            agreed=True,
        )
    parts = session.synchronizer.parts
    if parts.shards.is_schedule_free:
        raise UnsupportedError(
            "swarm.search: a schedule-free optimizer evaluates other weights than it trains; export the particles, and "
            "use ds-pso search",
            agreed=True,
        )
    if len(parts.membership.reachable()) < session.num_particles:
        raise ConfigError(
            'swarm.search: swarm.transport = "elastic": particles that may go cannot all be in a combination; use '
            '"static"'
        )
    return parts


def _open(session: Session, settings: ExpertSearch, models: ParticleModels, options: Mapping[str, Any]) -> Record:
    """Begin the record, or go on with that in the run folder; the leader writes it, and all others remember it."""
    known = {
        "experts": models.digests(),
        "higher_is_better": settings.higher_is_better,
        "searcher": settings.searcher,
        "options": dict(options),
        "blocks": settings.blocks,
        "seed": settings.seed,
    }
    folder, coordinator = session.run_dir, session.world.coordinator
    if settings.resume and folder is None:
        raise ConfigError("swarm.search resume = True: there is no run folder; give ds_pso.init a run_dir")
    record = Record((folder or Path()) / NAME, known, on_disk=False)
    with coordinator.agree("opening the record of swarm.search"):
        if session.is_leader and folder is not None:
            record = Record.open(folder, known, resume=settings.resume)
    mine = [asdict(evaluation) for evaluation in record.evaluations]
    record.evaluations[:] = [Evaluation(**item) for item in coordinator.gather("the record of swarm.search", mine)[0]]
    return record
