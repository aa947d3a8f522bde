"""What is compared: sizes of the experiment, targets, and the rows of the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SEEDS = (1, 2, 3, 4, 5)  # of the base, the experts and the search together
SEQ_LENGTH = 128
VOCABULARY = 1024


@dataclass(frozen=True)
class Size:
    """A base, and how it and its experts are trained.

    Attributes:
        model: ``llama:<layers>x<width>``.
        base_steps, expert_steps: optimizer steps; the base sees all domains, an expert its own.
        batch: sequences in a step.
        search, test: sequences by which is searched, and others by which is reported.
        evaluations: budget of each search.
    """

    model: str
    base_steps: int
    expert_steps: int
    batch: int = 16
    search: int = 200
    test: int = 400
    evaluations: int = 320


SIZES = {
    "tiny": Size("llama:2x32", base_steps=30, expert_steps=20, batch=4, search=8, test=8, evaluations=40),
    "small": Size("llama:4x64", base_steps=800, expert_steps=400),  # 0.25 million parameters
    "medium": Size("llama:4x128", base_steps=1600, expert_steps=800),  # 0.88 million
}

# Equal shares of the held-out text of these domains; ``everything`` is all but the harmful one. A target with a domain
# of --text is left out without it.
TARGETS: dict[str, tuple[str, ...]] = {
    "network + data": ("network", "data"),
    "docstrings + sort": ("docstrings", "sort"),
    "copy + arithmetic": ("copy", "arithmetic"),
    "wikitext2-valid + network": ("wikitext2-valid", "network"),
    "everything": (),
}


@dataclass(frozen=True)
class Row:
    """A row of the table; without a searcher it is the base itself."""

    name: str
    searcher: str = ""
    blocks: Literal["layers", "tensors", "one"] = "layers"
    base: bool = False
    options: Mapping[str, object] = field(default_factory=dict)


GREEDY = "greedy soup"
ROWS = [
    Row("base"),
    Row("best single expert", "best_single"),
    Row("uniform soup", "uniform_soup"),
    Row("task arithmetic", "task_arithmetic", base=True),
    Row(GREEDY, "greedy_soup"),
    Row("random, one weight per expert", "random", "one"),
    Row("random, per layer", "random"),
    Row("Model Swarms", "model_swarms", "one", options={"patience": 0}),
    Row("CMA-ES, one weight per expert", "cma", "one"),
    Row("CMA-ES, per layer", "cma"),
    Row("PSO, one weight per expert", "pso", "one"),
    Row("PSO, per layer", "pso"),
    Row("PSO, per layer, with the base", "pso", base=True),
    Row("PSO, per tensor", "pso", "tensors"),
]
