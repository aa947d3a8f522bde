"""Waiting for the GPU, which still works when the calls that gave it the work have returned."""

from __future__ import annotations

import torch


def wait_for_device() -> None:
    """Wait until all is done that this thread's stream was given; on a CPU it is done already."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
