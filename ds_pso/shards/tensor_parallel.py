"""Parameters that DeepSpeed's AutoTP has split over the ranks of a group: a rank's part, made whole."""

from __future__ import annotations

from torch import Tensor

_GATHER = "gather_params"  # a method of the layer, which knows how it was split; DeepSpeed gives it to the parameter


def is_split(parameter: Tensor) -> bool:
    """Return true if this rank has a part of the parameter, and the other ranks of its group have the rest."""
    return hasattr(parameter, _GATHER)


def made_whole(parameter: Tensor, part: Tensor) -> Tensor:
    """Return the values of a whole parameter, given this rank's part of them; called on all ranks of the group.

    Args:
        parameter: of the module; it stays as it is. What AutoTP has not split every rank has whole.
        part: of its shape.
    """
    if not is_split(parameter):
        return part
    holder = part.detach().clone()
    getattr(parameter, _GATHER)([holder])  # puts other values into the tensors that it is given
    return holder
