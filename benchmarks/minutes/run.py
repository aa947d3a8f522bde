"""One run: both ends train, then their weights are scored. And which runs are missing."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.levers.search import interior_optimum, rate_to_try
from benchmarks.levers.settings import FIRST_RATE
from benchmarks.minutes.results import Outcome, Run
from benchmarks.minutes.settings import BANDWIDTHS, BATCH, BY_NAME, HELD_OUT, NUM_ENDS, SEQ_LENGTH, SNAPSHOTS, Row
from benchmarks.minutes.text import CACHE, build_llama, load_text, mean_loss
from benchmarks.slow_link.ends import run_ends
from benchmarks.slow_link.network import Link, slow_link
from benchmarks.table import machine, versions
from ds_pso.training.text import Corpus

_GRACE_S = 600.0  # for starting, the last step, and writing the weights


@dataclass(frozen=True)
class Plan:
    """How long each run is, of which model, and how many seeds a row gets whose learning rate is known."""

    minutes: float
    search_minutes: float
    seeds: int
    model: str


def tried(row: str, bandwidth: str, rows: Mapping[Run, Outcome], plan: Plan) -> dict[float, float]:
    """Return the validation loss by the learning rate, of those tried; infinite where it diverged."""
    found = {
        run.lr: outcome.validation_loss
        for run, outcome in rows.items()
        if run.search and (run.row, run.bandwidth, run.minutes, run.model) == _cell(row, bandwidth, plan)
    }
    return {lr: loss if math.isfinite(loss) else math.inf for lr, loss in sorted(found.items())}


def _cell(row: str, bandwidth: str, plan: Plan) -> tuple[str, str, float, str]:
    return row, bandwidth, plan.search_minutes, plan.model


def missing(wanted: Sequence[Row], rows: Mapping[Run, Outcome], plan: Plan) -> Iterator[Run]:
    """What can be run now: for each row and bandwidth the next learning rate or, if the best is known, a seed."""
    for row in wanted:
        for bandwidth in row.bandwidths:
            found = tried(row.name, bandwidth, rows, plan)
            lr = rate_to_try(found, FIRST_RATE[row.inner])
            if lr is not None:
                yield Run(row.name, bandwidth, plan.search_minutes, lr, 0, True, plan.model)
                continue
            best = interior_optimum(found)
            assert best is not None
            seeds = (
                Run(row.name, bandwidth, plan.minutes, best, s, False, plan.model) for s in range(1, plan.seeds + 1)
            )
            yield from (run for run in seeds if run not in rows)


def carry_out(run: Run) -> Outcome:
    """Train over the run's link, and score."""
    with slow_link(BANDWIDTHS.get(run.bandwidth, max(BANDWIDTHS.values()))) as link:
        return train_and_score(run, link)


def train_and_score(run: Run, link: Link, text: Path = CACHE) -> Outcome:
    """Train at both ends of ``link``; then load what they kept, and score it.

    Raises:
        RuntimeError: an end failed.
    """
    with tempfile.TemporaryDirectory() as name:
        ends = train_ends(run, link, Path(name), text)
        together = BY_NAME[run.row].stack.talks
        models = [list(range(NUM_ENDS))] if together else [[end] for end in range(NUM_ENDS)]
        corpus = load_text(text)
        scores = [_score(run, corpus, Path(name), model, len(ends[0]["times"])) for model in models]
    times = [statistics.fmean(seconds) / 60 for seconds in zip(*(end["times"] for end in ends), strict=True)]
    losses = [statistics.fmean(found) for found in zip(*(score.losses for score in scores), strict=True)]
    steps = min(end["steps"] for end in ends)
    return Outcome(
        validation_loss=statistics.fmean(score.validation_loss for score in scores),
        loss=losses[-1],
        curve=" ".join(f"{minutes:.4f}:{loss:.5f}" for minutes, loss in zip(times, losses, strict=True)),
        steps=steps,
        step_s=60 * times[-1] / steps,
        tokens_per_s=(NUM_ENDS if together else 1) * steps * BATCH * SEQ_LENGTH / (60 * times[-1]),
        bytes_per_step=max(end["received"] for end in ends) / steps if together else 0.0,
        parameters=scores[0].parameters,
        machine=machine(),
        versions=versions(),
    )


def train_ends(run: Run, link: Link, folder: Path, text: Path = CACHE) -> list[dict[str, Any]]:
    """Train at both ends, which put their weights into ``folder``: ``weights_of(folder, end, number)`` reads them."""
    told = {"run": asdict(run), "folder": str(folder), "text": str(text), "snapshots": 1 if run.search else SNAPSHOTS}
    return run_ends(link, "benchmarks.minutes.worker", json.dumps(told), 60 * run.minutes + _GRACE_S)


def weights_of(folder: Path, end: int, number: int) -> dict[str, Tensor]:
    """The weights of an end at a snapshot."""
    return load_file(folder / f"end_{end}_{number}.safetensors")


@dataclass(frozen=True)
class _Score:
    losses: list[float]  # of each snapshot, on the sequences that the page reports
    validation_loss: float  # of the last, on those by which rates are chosen
    parameters: int


def _score(run: Run, corpus: Corpus, folder: Path, ends: list[int], num_snapshots: int) -> _Score:
    """Held-out losses of the mean of the weights of ``ends``."""
    model = build_llama(run.model, corpus, run.seed)
    order = torch.randperm(len(corpus.held_out), generator=torch.Generator().manual_seed(0)).tolist()
    half = min(HELD_OUT, len(order) // 2)
    losses = []
    for number in range(num_snapshots):
        mean = mean_weights([weights_of(folder, end, number) for end in ends])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(mean[name])
        losses.append(mean_loss(model, corpus.held_out, order[half:][:half]))
    validation_loss = mean_loss(model, corpus.held_out, order[:half])
    return _Score(losses, validation_loss, sum(p.numel() for p in model.parameters()))


def mean_weights(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each tensor, as an export of local SGD would."""
    return {name: torch.stack([one[name] for one in weights]).mean(0) for name in weights[0]}
