"""Warm up, hold, decay late: a learning-rate schedule for DeepSpeed's ``scheduler`` section."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime import lr_schedules

from ds_pso.errors import ConfigError


class WarmupHoldDecayLR(lr_schedules.WarmupDecayLR):
    """``{"scheduler": {"type": "WarmupHoldDecayLR", "params": {...}}}``

    With t the last step's number, counted from 0, W = warmup_num_steps, T = total_num_steps and
    D = decay_ratio * T, the rate lies at warmup_min_lr + gamma (warmup_max_lr - warmup_min_lr)::

        gamma = t / W          while t < W      (warmup_type "linear")
                1              while t < T - D
                (T - t) / D    until T, and 0 after

    The other parameters are those of DeepSpeed's WarmupDecayLR. Called WSD elsewhere: S. Hu et
    al., "MiniCPM", arXiv 2404.06395, section 4.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_lr: float = 0.0,
        warmup_max_lr: float = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = lr_schedules.WARMUP_LINEAR_RATE,
        decay_ratio: float = 0.1,
        last_batch_iteration: int = -1,
    ) -> None:
        if not isinstance(total_num_steps, int) or isinstance(total_num_steps, bool) or total_num_steps < 1:
            raise ConfigError(
                f"scheduler.params.total_num_steps = {total_num_steps!r}: must be a whole number of at least 1; "
                'only ds_pso/train.py fills in "auto"'
            )
        if not isinstance(decay_ratio, int | float) or not 0 < decay_ratio <= 1:
            raise ConfigError(f"scheduler.params.decay_ratio = {decay_ratio!r}: must lie in (0, 1]")
        self.decay_num_steps = max(1, round(decay_ratio * total_num_steps))
        super().__init__(
            optimizer,
            total_num_steps,
            warmup_min_lr,
            warmup_max_lr,
            # DeepSpeed refuses 0, which the Trainer of older transformers fills in for "auto" without a warm-up.
            1 if warmup_num_steps == 0 else warmup_num_steps,
            warmup_type,
            last_batch_iteration,
        )

    def get_lr(self) -> list[float]:
        # DeepSpeed's constructors ask before the first step, and warn themselves about it.
        return list(self.min_lrs) if self.last_batch_iteration < 0 else super().get_lr()

    def _get_gamma(self) -> float:
        if self.last_batch_iteration < self.warmup_num_steps:
            return float(super()._get_gamma())
        remaining = self.total_num_steps - self.last_batch_iteration
        return min(1.0, max(0.0, remaining / self.decay_num_steps))


def register() -> None:
    """Let DeepSpeed find the schedule by name: it looks names up in its own module."""
    lr_schedules.WarmupHoldDecayLR = WarmupHoldDecayLR
