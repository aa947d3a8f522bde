"""The peak speed of common GPUs, as published."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

# Dense bf16 TFLOP/s, accumulated in fp32. NVIDIA's data sheets print twice as much, "with sparsity". Sources: NVIDIA's
# data sheets of A10, A30, A40, A100, L4, L40S, H100, H200, H20 and HGX B200; the architecture whitepapers for RTX 3090
# and A6000 (GA102), 4090 (Ada) and 5090 (Blackwell); AMD's data sheets of MI250X (two dies), MI300X and MI325X.
PEAK_TFLOPS = {
    "A10": 125,
    "A30": 165,
    "A40": 150,
    "A100": 312,
    "A6000": 155,
    "L4": 121,
    "L40S": 362,
    "RTX3090": 71,
    "RTX4090": 165,
    "RTX5090": 210,
    "H20": 148,
    "H100-PCIe": 756,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "MI250X": 383,
    "MI300X": 1307,
    "MI325X": 1307,
}


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a particle.

    Attributes:
        number: how many.
        name: as in ``PEAK_TFLOPS``.
    """

    number: int
    name: str

    @property
    def peak_flops(self) -> float:
        """FLOP/s of all of them, dense, in bf16."""
        return self.number * PEAK_TFLOPS[self.name] * 1e12


def gpus(text: str) -> Gpus:
    """Read a number and a name such as ``8xH100``; the type of an argument."""
    found = re.fullmatch(r"([1-9]\d*) ?x ?(.+)", text)
    number, name = (int(found[1]), found[2]) if found else (1, text)
    known = {_plain(name): name for name in PEAK_TFLOPS}
    if _plain(name) not in known:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be a number and a name such as 8xH100, of {', '.join(PEAK_TFLOPS)}; for others give "
            "--step-seconds"
        )
    return Gpus(number, known[_plain(name)])


def _plain(name: str) -> str:
    """Return a name without what people write differently."""
    return re.sub(r"[^A-Z0-9]", "", name.upper().removeprefix("NVIDIA")).removeprefix("RTX")


def step_seconds(parameters: float, tokens: float, of: Gpus, mfu: float) -> float:
    """Return the seconds of a step of this many tokens.

    Forward and backward pass take 6 FLOP for each parameter and token (J. Kaplan et al., arXiv 2001.08361, 2.1);
    ``mfu``, the model FLOPs utilisation, is the share of the peak that training reaches (A. Chowdhery et al., arXiv
    2204.02311, appendix B).
    """
    return 6 * parameters * tokens / (mfu * of.peak_flops)
