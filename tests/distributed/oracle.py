"""What a swarm should compute, in one process: plain torch training, and the rules in NumPy.

Written from the equations of docs/sync-modes.md and the papers, not from the code of ds_pso.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from .jobs import Case, Net, Weights, particle_batch

Particles = list[np.ndarray]  # flat weights of each particle


class LocalSgdOracle:
    def sync(self, x: Particles, losses: list[float]) -> Particles:
        return [np.mean(x, axis=0) for _ in x]


class DiLoCoOracle:
    """a <- a - eta (g + mu u), u <- mu u + g, g = a - mean x."""

    def __init__(self, start: np.ndarray, outer_lr: float = 0.7, outer_momentum: float = 0.6) -> None:
        self.anchor, self.momentum = start.copy(), np.zeros_like(start)
        self.eta, self.mu = outer_lr, outer_momentum

    def sync(self, x: Particles, losses: list[float]) -> Particles:
        gradient = self.anchor - np.mean(x, axis=0)
        self.momentum = self.mu * self.momentum + gradient
        self.anchor = self.anchor - self.eta * (gradient + self.mu * self.momentum)
        return [self.anchor.copy() for _ in x]


class PsoOracle:
    """v <- w v + c1 r1 (p - x) + c2 r2 (g - x), x <- x + v."""

    def __init__(self, start: np.ndarray, num_particles: int, **options: Any) -> None:
        self.w, self.c1, self.c2 = (options.get(k, d) for k, d in (("inertia", 0), ("cognitive", 0), ("social", 1)))
        self.all_time = options.get("best") == "all_time"
        self.random = options.get("randomness") == "per_sync"
        self.velocity = [np.zeros_like(start) for _ in range(num_particles)]
        self.best = [start.copy() for _ in range(num_particles)]
        self.best_loss = [np.inf] * num_particles
        self.index = 0

    def sync(self, x: Particles, losses: list[float]) -> Particles:
        for i, loss in enumerate(losses):
            if loss < self.best_loss[i]:
                self.best_loss[i], self.best[i] = loss, x[i].copy()
        winner = int(np.argmin(self.best_loss if self.all_time else losses))
        leader = (self.best if self.all_time else x)[winner].copy()
        moved = []
        for i, here in enumerate(x):
            # The documented seeding: (seed, sync point, particle).
            r1, r2 = np.random.default_rng([0, self.index, i]).random(2) if self.random else (0.5, 0.5)
            self.velocity[i] = (
                self.w * self.velocity[i] + self.c1 * r1 * (self.best[i] - here) + self.c2 * r2 * (leader - here)
            )
            moved.append(here + self.velocity[i])
        self.index += 1
        return moved


def train_particles(case: Case) -> list[Weights]:
    """Final weights of each particle of a job with fp32, particle 0's start, and no BatchNorm or dropout."""
    num_particles = int(case.particles)
    torch.manual_seed(100 if case.seed is None else case.seed)
    start = Net()
    models = [Net() for _ in range(num_particles)]
    for model in models:
        model.load_state_dict(start.state_dict())
    names = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}
    optimizers = [names[case.optimizer](model.parameters(), lr=case.lr) for model in models]
    oracle = {
        "local_sgd": lambda: LocalSgdOracle(),
        "diloco": lambda: DiLoCoOracle(_flat(start), **case.options),
        "pso": lambda: PsoOracle(_flat(start), num_particles, **case.options),
    }[case.sync_mode]()
    losses: list[list[float]] = [[] for _ in models]
    for step in range(case.steps):
        for particle, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            x, y = particle_batch(particle, step)
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[particle].append(loss.item())
        if (step + 1) % case.interval == 0:
            moved = oracle.sync([_flat(model) for model in models], [float(np.mean(part)) for part in losses])
            for model, values in zip(models, moved, strict=True):
                nn.utils.vector_to_parameters(torch.from_numpy(values.astype(np.float32)), model.parameters())
            losses = [[] for _ in models]
    return [{name: p.detach().numpy().copy() for name, p in model.named_parameters()} for model in models]


def _flat(model: nn.Module) -> np.ndarray:
    """In float64, so that the oracle adds no rounding of its own."""
    return nn.utils.parameters_to_vector(model.parameters()).detach().double().numpy()
