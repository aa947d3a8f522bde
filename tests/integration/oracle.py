"""What a swarm should compute, in one process: plain torch training, and the rules in NumPy.

Written from the equations of docs/sync-modes.md and the papers, not from the code of ds_pso.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from .jobs import CLEAN, Case, Net, Weights, particle_batch

Particles = list[np.ndarray]  # flat weights of each particle
Score = Callable[[np.ndarray, int], float]  # loss of flat weights on the probe batch of a sync point


@dataclass(frozen=True)
class Problem:
    """What an oracle may know."""

    start: np.ndarray  # flat weights with which all begin
    num_particles: int
    sizes: dict[str, int]  # of the parameters, in the order in which they lie in ``start``
    total: int | None  # sync points of the whole training
    interval: int  # optimizer steps between two of them
    score: Score
    rounds: bool = False  # whether movements are kept in bf16


class Oracle:
    """Base: an average of the particles, and learning rates that are left alone."""

    def __init__(self, problem: Problem, **options: Any) -> None:
        self.problem = problem
        self.index = 0  # sync points so far
        self.lr_factors = [1.0] * problem.num_particles
        self.begin(problem.start.copy(), **options)

    def begin(self, start: np.ndarray) -> None:
        pass

    def sync(self, x: Particles, losses: list[float]) -> Particles:
        moved = self.move(x, losses)
        self.index += 1
        if self.problem.rounds:
            self.round()
        return moved

    def round(self) -> None:
        """Keep movements in bf16."""

    def move(self, x: Particles, losses: list[float]) -> Particles:
        return [np.mean(x, axis=0) for _ in x]

    def model(self, x: Particles) -> np.ndarray:
        """What is exported."""
        return np.mean(x, axis=0)

    @property
    def progress(self) -> float:
        assert self.problem.total
        return (self.index + 1) / self.problem.total


class DiLoCoOracle(Oracle):
    """a <- a - eta (g + mu u), u <- mu u + g, g = a - mean x."""

    def begin(self, start: np.ndarray, outer_lr: float = 0.7, outer_momentum: float = 0.6, merge: str = "mean") -> None:
        self.anchor, self.momentum = start, np.zeros_like(start)
        self.eta, self.mu, self.merge = outer_lr, outer_momentum, merge

    def round(self) -> None:
        self.momentum = in_bf16(self.momentum)

    def move(self, x: Particles, losses: list[float]) -> Particles:
        gradient = np.mean([self.anchor - own for own in x], axis=0)
        if self.merge == "rda":
            bounds = np.cumsum([0, *self.problem.sizes.values()])
            for name, start, stop in zip(self.problem.sizes, bounds, bounds[1:], strict=False):
                if name.endswith("weight") and "norm" not in name:
                    parts = [(self.anchor - own)[start:stop] for own in x]
                    direction = sum(part / np.linalg.norm(part) for part in parts)
                    length = np.mean([np.linalg.norm(part) for part in parts])
                    gradient[start:stop] = length * direction / np.linalg.norm(direction)
        self.momentum = self.mu * self.momentum + gradient
        self.anchor = self.anchor - self.eta * (gradient + self.mu * self.momentum)
        return [self.anchor.copy() for _ in x]


class EasgdOracle(Oracle):
    """x_i <- x_i - alpha (x_i - c), c <- (1 - beta) c + beta mean x, alpha = beta / P."""

    def begin(self, start: np.ndarray, beta: float = 0.9) -> None:
        self.center, self.beta = start, beta

    def move(self, x: Particles, losses: list[float]) -> Particles:
        alpha = self.beta / len(x)
        moved = [here - alpha * (here - self.center) for here in x]
        self.center = (1 - self.beta) * self.center + self.beta * np.mean(x, axis=0)
        return moved

    def model(self, x: Particles) -> np.ndarray:
        return self.center


class NoLoCoOracle(Oracle):
    """u_i <- alpha u_i + beta ((x_i + x_j) / 2 - a_i), a_i <- a_i + u_i, with partners i and j drawn at each sync."""

    def begin(self, start: np.ndarray, outer_lr: float = 0.7, outer_momentum: float = 0.5) -> None:
        self.anchors = [start] * self.problem.num_particles
        self.momenta = [np.zeros_like(start)] * self.problem.num_particles
        self.beta, self.alpha = outer_lr, outer_momentum

    def move(self, x: Particles, losses: list[float]) -> Particles:
        order = np.random.default_rng([0, self.index]).permutation(len(x))
        for pair in np.split(order, len(x) // 2):
            mean = np.mean([x[i] for i in pair], axis=0)
            for i in pair:
                self.momenta[i] = self.alpha * self.momenta[i] + self.beta * (mean - self.anchors[i])
                self.anchors[i] = self.anchors[i] + self.momenta[i]
        return [anchor.copy() for anchor in self.anchors]


class NoSyncOracle(Oracle):
    """x_i <- (1 - p) x_i + p mean x, p from one value to the other."""

    def begin(
        self, start: np.ndarray, pressure: float = 0.1, final_pressure: float = 1.0, growth: str = "linear"
    ) -> None:
        self.pressure = {
            "linear": lambda t: (1 - t) * pressure + t * final_pressure,
            "exponential": lambda t: pressure ** (1 - t) * final_pressure**t,
            "constant": lambda t: pressure,
        }[growth]

    def move(self, x: Particles, losses: list[float]) -> Particles:
        p = self.pressure(self.progress)
        return [(1 - p) * here + p * np.mean(x, axis=0) for here in x]


class PsoOracle(Oracle):
    """v <- clamp(chi (w v + c1 r1 (p - x) + c2 r2 (g - x))), x <- x + v."""

    def begin(self, start: np.ndarray, **options: Any) -> None:
        self.options = {"inertia": 0.0, "cognitive": 0.0, "social": 1.0, "best": "window", "topology": "global"}
        self.options |= {"constriction": False, "velocity_clamp": np.inf, "randomness": "none"} | options
        self.velocity = [np.zeros_like(start) for _ in range(self.problem.num_particles)]
        self.best = [start.copy() for _ in range(self.problem.num_particles)]
        self.best_loss = [np.inf] * self.problem.num_particles

    def round(self) -> None:
        self.velocity = [in_bf16(velocity) for velocity in self.velocity]

    def coefficient(self, name: str) -> float:
        start, final = self.options[name], self.options.get(f"final_{name}")
        return start if final is None else (1 - self.progress) * start + self.progress * final

    def random_factors(self, particle: int) -> tuple[Any, Any]:
        """By the documented seeding: (seed, sync point, particle), and the parameter's name."""
        if self.options["randomness"] == "none":
            return 0.5, 0.5
        key = [0, self.index, particle]
        if self.options["randomness"] == "per_sync":
            r1, r2 = np.random.default_rng(key).random(2)
            return r1, r2
        sizes = self.problem.sizes
        pairs = [np.random.default_rng([*key, zlib.crc32(name.encode())]).random(2) for name in sizes]
        r1, r2 = (np.repeat([pair[k] for pair in pairs], list(sizes.values())) for k in (0, 1))
        return r1, r2

    def move(self, x: Particles, losses: list[float]) -> Particles:
        for i, loss in enumerate(losses):
            if loss < self.best_loss[i]:
                self.best_loss[i], self.best[i] = loss, x[i].copy()
        all_time = self.options["best"] == "all_time"
        ranking, places = (self.best_loss, [b.copy() for b in self.best]) if all_time else (losses, x)
        w, c1, c2 = (self.coefficient(name) for name in ("inertia", "cognitive", "social"))
        chi = 1.0
        if self.options["constriction"]:
            phi, w = c1 + c2, 1.0
            chi = 2 / (phi - 2 + np.sqrt(phi**2 - 4 * phi))
        moved = []
        for i, here in enumerate(x):
            known = list(range(len(x)))
            if self.options["topology"] == "ring":
                known = sorted({(i - 1) % len(x), i, (i + 1) % len(x)})
            leader = places[min(known, key=lambda j: ranking[j])]
            r1, r2 = self.random_factors(i)
            velocity = chi * (w * self.velocity[i] + c1 * r1 * (self.best[i] - here) + c2 * r2 * (leader - here))
            self.velocity[i] = np.clip(velocity, -self.options["velocity_clamp"], self.options["velocity_clamp"])
            moved.append(here + self.velocity[i])
        return moved


class SwarmOracle(Oracle):
    """m = mean, or in doubt the weighted mean if that is better; u <- beta u + (a - m), a <- a - u; learning rates."""

    def begin(self, start: np.ndarray, **options: Any) -> None:
        self.options = options  # all of them: what the defaults are is no matter of these tests
        self.anchor, self.momentum = start, np.zeros_like(start)
        self.mu, self.lean, self.sigma, self.z = 0.0, 0.0, 0.0, None
        self.window: list[list[float]] = []  # losses of the sync points since the last comparison
        self.winners: list[str] = []  # of the sync points at which the guard acted
        self.scores: list[list[float]] = []  # there, of the mean and of the weighted mean

    def move(self, x: Particles, losses: list[float]) -> Particles:
        o, total = self.options, self.problem.total
        self.window.append(losses)
        compared = len(self.window) * self.problem.interval >= o["fitness_steps"]
        if compared:
            losses, self.window = list(np.mean(self.window, axis=0)), []
        mean = np.mean(x, axis=0)
        believed = compared and self._unequal(losses)
        if compared and o["guard"]:
            losses = [self.problem.score(own, self.index) for own in x]
            believed = False
            if self._unequal(losses):
                weights = self._softmax(losses)
                weights[weights < 0.1 / len(x)] = 0
                weighted = np.tensordot(weights / weights.sum(), np.stack(x), 1)
                self.scores.append([self.problem.score(candidate, self.index) for candidate in (mean, weighted)])
                believed = self.scores[-1][1] < self.scores[-1][0]
                self.winners.append("weighted" if believed else "mean")
                mean = weighted if believed else mean
        no_inertia = total is not None and (total <= 10 or self.index + 1 >= total)
        self.momentum = (0 if no_inertia else o["inertia"]) * self.momentum + (self.anchor - mean)
        self.anchor = self.anchor - self.momentum
        self._set_learning_rates(losses, believed, compared)
        return [self.anchor.copy() for _ in x]

    def round(self) -> None:
        self.momentum = in_bf16(self.momentum)

    def _softmax(self, losses: list[float]) -> np.ndarray:
        weights = np.exp((min(losses) - np.array(losses)) / self.options["temperature"])
        return weights / weights.sum()

    def _unequal(self, losses: list[float]) -> bool:
        return 1 / (len(losses) * np.sum(self._softmax(losses) ** 2)) < 1 - self.options["unequal_above"]

    def _set_learning_rates(self, losses: list[float], believed: bool, compared: bool) -> None:
        """mu <- mu + eta sigma s, s = sum u_i z_i with the sigma and z of the steps that gave these losses."""
        p = len(losses)
        if compared and self.z is not None:
            utilities = (p - 1) / 2 - np.argsort(np.argsort(losses))
            utilities = utilities / np.sum(np.abs(utilities))
            s = np.sum(utilities * self.z)
            self.lean = 0.7 * self.lean + s / np.sqrt(np.sum(utilities**2) * np.sum(self.z**2) / (p - 1))
            if believed or (s > 0 and self.lean > 2.5):
                self.mu += self.options["lr_step"] * self.sigma * s
        shrink = 1.0 if self.problem.total is None else min(1.0, 2 * (1 - self.progress))
        self.sigma = np.log(self.options["lr_spread"]) * shrink
        if compared or self.z is None:
            self.z = np.random.default_rng([0, self.index]).permutation(np.linspace(-1, 1, p))
        self.lr_factors = list(np.exp(self.mu + self.sigma * self.z))


class LineSearchOracle(Oracle):
    """y_i = m - s_i mu u for some s_i, of which the best becomes the consensus."""

    def begin(self, start: np.ndarray, inertia: float = 0.7, longest: float = 1.5, margin: float = 0.001) -> None:
        self.anchor, self.momentum = start, np.zeros_like(start)
        self.inertia, self.longest, self.margin = inertia, longest, margin
        self.winners: list[int] = []
        self.scores: list[list[float]] = []

    def round(self) -> None:
        self.momentum = in_bf16(self.momentum)

    def move(self, x: Particles, losses: list[float]) -> Particles:
        lengths = np.linspace(0, self.longest, len(x))
        candidates = [np.mean(x, axis=0) - s * self.inertia * self.momentum for s in lengths]
        scores = [self.problem.score(candidate, self.index) for candidate in candidates]
        winner = int(np.argmin(scores))
        if scores[winner] >= (1 - self.margin) * scores[0]:
            winner = 0
        self.winners.append(winner)
        self.scores.append(scores)
        self.momentum = self.anchor - candidates[winner]
        self.anchor = candidates[winner]
        return [self.anchor.copy() for _ in x]


ORACLES: dict[str, type[Oracle]] = {
    "local_sgd": Oracle,
    "diloco": DiLoCoOracle,
    "easgd": EasgdOracle,
    "noloco": NoLoCoOracle,
    "nosync": NoSyncOracle,
    "pso": PsoOracle,
    "swarm": SwarmOracle,
    "line_search": LineSearchOracle,
}


def probe_loss(weights: np.ndarray, index: int, dtype: torch.dtype = torch.float32) -> float:
    """Of the model with these flat weights, on what ``jobs.probe_of`` shows."""
    model = Net()
    _set(model, weights)
    x, y = particle_batch(CLEAN, index)
    with torch.no_grad():
        return nn.functional.mse_loss(model.to(dtype)(x.to(dtype)).float(), y).item()


def make_oracle(case: Case, start: np.ndarray) -> Oracle:
    total = case.swarm.get("total_steps")
    problem = Problem(
        start=start,
        num_particles=int(case.particles),
        sizes={name: p.numel() for name, p in Net(layers=case.layers).named_parameters()},
        total=None if total is None else total // (case.interval // _turns(case)),
        interval=case.interval,
        score=partial(probe_loss, dtype=case.dtype),
        rounds=case.swarm.get("state_dtype") == "bf16",
    )
    return ORACLES[case.sync_mode](problem, **case.options)


def _turns(case: Case) -> int:
    """How many sync points an interval has, each for one fragment."""
    return case.swarm["fragments"] if case.swarm.get("streaming") else 1


def train_particles(case: Case, fragment_of: np.ndarray | None = None) -> list[Weights]:
    """Final weights of each particle of a job with fp32, particle 0's start, and no BatchNorm or dropout.

    ``fragment_of``: for each of the flat weights, the number of the fragment it is in.
    """
    return follow(case, fragment_of=fragment_of)[0]


def follow(
    case: Case, lies: tuple[float, ...] | None = None, fragment_of: np.ndarray | None = None
) -> tuple[list[Weights], Oracle]:
    """The same, and the oracle that led there; ``lies`` are added to the losses that the particles report."""
    fragments, turns = case.swarm.get("fragments", 1), _turns(case)
    spacing = case.interval // turns
    lies = lies or (0.0,) * int(case.particles)
    torch.manual_seed(100 if case.seed is None else case.seed)
    start = Net(layers=case.layers)
    models = [Net(layers=case.layers) for _ in range(int(case.particles))]
    for model in models:
        model.load_state_dict(start.state_dict())
    optimizers = [_optimizer(case, model) for model in models]
    oracles = [make_oracle(case, flat(start)) for _ in range(turns)]
    oracle, count = oracles[0], 0
    losses: list[list[float]] = [[] for _ in models]
    # Of each fragment on its way the step at which it is due; its elements; weights before and after the sync point,
    # and learning rates, which come with the last one.
    pending: list[tuple[int, Any, Particles, Particles, tuple[list[float], Any] | None]] = []
    for step in range(case.steps):
        for particle, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            x, y = particle_batch(particle, step)
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[particle].append(loss.item() + lies[particle])
        pending = _arrive(case, models, optimizers, pending, step + 1)
        if (step + 1) % spacing == 0:
            assert not pending
            x = [flat(model) for model in models]
            means = [float(np.mean(part)) for part in losses]
            losses = [[] for _ in models]
            count += 1
            is_last = oracle.problem.total is not None and count >= oracle.problem.total
            delay = 0 if is_last else case.swarm.get("delay", 0)
            if turns > 1:
                assert fragment_of is not None
                for number in range(turns) if is_last else [(count - 1) % turns]:
                    oracles[number].index = count - 1
                    moved = _mixed(case, x, oracles[number].sync(x, means), late=delay > 0)
                    pending.append((step + 1 + delay, fragment_of == number, x, moved, None))
                pending = _arrive(case, models, optimizers, pending, step + 1)
                continue
            moved = _mixed(case, x, oracle.sync(x, means), late=delay > 0)
            for number in range(fragments):
                elements = slice(None) if fragment_of is None else fragment_of == number
                completes = number == fragments - 1
                due = step + 1 + math.ceil(delay * (number + 1) / fragments)
                last = (list(oracle.lr_factors), _moments_to_be(case, optimizers, count, delay)) if completes else None
                pending.append((due, elements, x, moved, last))
            pending = _arrive(case, models, optimizers, pending, step + 1)
    return [{name: p.detach().numpy().copy() for name, p in model.named_parameters()} for model in models], oracle


def _mixed(case: Case, before: Particles, after: Particles, *, late: bool) -> Particles:
    """Where a late result leads, of which a particle leaves out a part."""
    left_out = case.swarm.get("mixing", 0.0) if late else 0.0
    return after if left_out == 0 else [x + (1 - left_out) * (y - x) for x, y in zip(before, after, strict=True)]


def _arrive(
    case: Case,
    models: list[Net],
    optimizers: list[torch.optim.Optimizer],
    pending: list[Any],
    step: int,
) -> list[Any]:
    """Apply what is due after ``step``: what came of a sync point, and the local steps since it began. The rest."""
    for due, elements, before, after, last in pending:
        if due > step:
            continue
        for model, x, y in zip(models, before, after, strict=True):
            weights = flat(model)
            weights[elements] = (y + (weights - x))[elements]
            _set(model, weights)
        if last is not None:
            factors, moments = last
            for optimizer, factor in zip(optimizers, factors, strict=True):
                optimizer.param_groups[0]["lr"] = case.lr * factor
            if case.swarm.get("optimizer_state") == "reset":
                for optimizer in optimizers:
                    optimizer.state.clear()  # as before the first step
            for state, name, moved in moments:
                state[name] += moved
            if moments and "moments" in case.swarm:
                _bound(optimizers)
    return [item for item in pending if item[0] > step]


def _optimizer(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    if case.optimizer == "SGD":
        return torch.optim.SGD(model.parameters(), lr=case.lr, momentum=case.momentum)
    return torch.optim.AdamW(model.parameters(), lr=case.lr)


MOMENTS = {"exp_avg": "first", "momentum_buffer": "first", "exp_avg_sq": "second"}


def _moments_to_be(case: Case, optimizers: list[torch.optim.Optimizer], count: int, delay: int) -> list[Any]:
    """(state, name, by how much it moves) of the moments that are averaged at sync point ``count``, from 1.

    So many steps later beta^delay is left of what they were, and as much of what is added to them.
    """
    if case.swarm.get("optimizer_state") != "average":
        return []
    every, group, found = case.swarm.get("moments", {}), optimizers[0].param_groups[0], []
    for states in zip(*(optimizer.state.values() for optimizer in optimizers), strict=True):
        for name in states[0].keys() - {"step"}:
            if count % every.get(f"{MOMENTS[name]}_every", 1) != 0:
                continue
            beta = group["momentum"] if name == "momentum_buffer" else group["betas"][name == "exp_avg_sq"]
            mean = torch.stack([state[name].double() for state in states]).mean(0)
            found += [(state, name, (beta**delay * (mean - state[name].double())).float()) for state in states]
    return found


def _bound(optimizers: list[torch.optim.Optimizer]) -> None:
    """|m| <= 1.05 C sqrt(v), C = (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2))."""
    for optimizer in optimizers:
        for state in optimizer.state.values():
            if "exp_avg_sq" in state:
                b1, b2 = optimizer.param_groups[0]["betas"]
                most = 1.05 * (1 - b1) / math.sqrt((1 - b2) * (1 - b1**2 / b2)) * state["exp_avg_sq"].sqrt()
                state["exp_avg"].copy_(state["exp_avg"].clamp(-most, most))


def in_bf16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).float().bfloat16().double().numpy()


def flat(model: nn.Module) -> np.ndarray:
    """In float64, so that the oracle adds no rounding of its own."""
    return nn.utils.parameters_to_vector(model.parameters()).detach().double().numpy()


def _set(model: nn.Module, weights: np.ndarray) -> None:
    nn.utils.vector_to_parameters(torch.from_numpy(weights.astype(np.float32)), model.parameters())
