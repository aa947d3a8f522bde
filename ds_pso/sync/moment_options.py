"""``swarm.moments``: when the optimizer's moments are averaged, and how they travel. Free of torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_pso.comm.compression import UNCOMPRESSED
from ds_pso.utils.strict_model import StrictModel

Kind = Literal["first", "second"]
KINDS: tuple[Kind, ...] = ("first", "second")


class MomentOptions(StrictModel):
    """``swarm.moments``"""

    first_every: int = Field(
        default=1,
        ge=1,
        description="Average first moments, the means of gradients (`exp_avg` of Adam, `momentum_buffer` of Muon and "
        "SGD), at every so many-th sync point.",
    )
    second_every: int = Field(
        default=1,
        ge=1,
        description="Average second moments, the means of their squares (`exp_avg_sq` of Adam), at every so many-th "
        "sync point.",
    )
    wire: Literal["fp32", "bf16", "int8", "int4"] = Field(
        default="fp32",
        description="How moments travel: as they are, or rounded, and what rounding takes away sent with the next "
        "ones. Of second moments the square roots are rounded.",
    )

    def due(self, index: int) -> tuple[Kind, ...]:
        """Return what is averaged at a sync point.

        Args:
            index: how many sync points came before.
        """
        return tuple(kind for kind in KINDS if (index + 1) % self.period(kind) == 0)

    def period(self, kind: Kind) -> int:
        """Return after how many sync points a kind is averaged again."""
        return self.first_every if kind == "first" else self.second_every

    @property
    def rounds(self) -> bool:
        """True if moments arrive otherwise than they were sent."""
        return self.wire != UNCOMPRESSED

    @property
    def keeps_whole(self) -> bool:
        """True if moments are averaged all at once, unrounded, so that they fit to one another."""
        return self.first_every == self.second_every and not self.rounds


ALL_AT_EACH_SYNC = MomentOptions()
