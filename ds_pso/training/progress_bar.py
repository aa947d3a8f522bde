"""Shows how far training is: a bar on a terminal, or one line per evaluation in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType

from tqdm import tqdm

from ds_pso.swarm import Swarm
from ds_pso.utils.units import human_bytes


class ProgressBar:
    """A bar on a terminal, or one line per evaluation; silent on all ranks but the leader."""

    def __init__(self, swarm: Swarm, first_step: int, num_steps: int) -> None:
        self._swarm, self._num_steps = swarm, num_steps
        self._held_out: list[float] = []
        self._bytes = 0
        self._start, self._first_step = time.time(), first_step
        self._bar: tqdm | None = None
        if swarm.is_leader and sys.stdout.isatty():
            self._bar = tqdm(
                total=num_steps,
                initial=first_step,
                file=sys.stdout,
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} |{bar:16}| {elapsed}<{remaining}{postfix}",
            )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            with _ignoring_lost_terminal():
                self._bar.close()

    @property
    def wants_loss(self) -> bool:
        """True if ``step`` shows the loss: reading it makes the host wait for the device."""
        return self._bar is not None

    def step(self, loss: float) -> None:
        """Show a step.

        Args:
            loss: of this particle.
        """
        if self._bar is not None:
            status = self._status(loss)
            with _ignoring_lost_terminal():
                self._bar.update()
                self._bar.set_postfix_str(status, refresh=False)

    def evaluated(self, step: int, held_out: list[float], loss: float) -> None:
        """Show an evaluation; call it on all ranks, which count the bytes of the whole swarm."""
        self._held_out, self._bytes = held_out, self._swarm.total_bytes()
        if self._swarm.is_leader and self._bar is None:
            elapsed = time.time() - self._start
            left = elapsed / max(1, step - self._first_step) * (self._num_steps - step)
            with _ignoring_lost_terminal():
                print(f"step {step:>5}/{self._num_steps} | {self._status(loss)} | {left:.0f} s left", flush=True)

    def _status(self, loss: float) -> str:
        swarm, totals = self._swarm, self._swarm.totals
        losses = swarm.last_losses if totals.count else (loss,)
        parts = [f"loss {_join(losses)}"]
        if self._held_out:
            parts.append(f"held-out {_join(self._held_out)}")
        if swarm.steps_to_sync is not None:
            parts.append(f"next sync in {swarm.steps_to_sync}")
            parts.append(f"sync {totals.seconds:.1f} s, {human_bytes(self._bytes)} moved")
        return " | ".join(parts)


def _ignoring_lost_terminal() -> contextlib.AbstractContextManager[None]:
    """Training goes on, if only to the checkpoint, when nobody sees how far it is."""
    return contextlib.suppress(OSError)


def _join(losses: tuple[float, ...] | list[float]) -> str:
    shown = [f"{loss:.3f}" for loss in losses[:8]]
    return " ".join(shown) + (" ..." if len(losses) > 8 else "")
