"""Parameters that are not trained, tied parameters and counters: alike on all particles, and exported."""

from pathlib import Path

import deepspeed
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from variants import slow_but

import ds_pso

from .jobs import Case, config, working_weights


class Adapter(nn.Module):
    """A frozen layer, a trained one, a tied pair, and an integer buffer."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(7, 5).requires_grad_(False)
        self.first = nn.Linear(5, 5, bias=False)
        self.last = nn.Linear(5, 5, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("calls", torch.tensor(3))

    def forward(self, x):
        return self.last(torch.tanh(self.first(self.base(x))))


def train_adapter(stage, folder):
    case = Case(stage=stage)
    with ds_pso.init(config(case, 2)) as swarm:
        torch.manual_seed(swarm.particle)  # particles would begin with different frozen weights
        model = Adapter()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=swarm.ds_config)
        swarm.attach(engine)
        generator = torch.Generator().manual_seed(swarm.particle)
        for _ in range(2):
            engine.backward(engine(torch.randn(4, 7, generator=generator)).square().mean())
            engine.step()
        swarm.export(Path(folder))
        return working_weights(engine)


@pytest.mark.parametrize("stage", slow_but([0, 3], [0, 1, 2, 3]))
def test_frozen_tied_and_integer_state(pool, tmp_path, stage):
    weights = pool.run(train_adapter, stage, tmp_path / "model")
    torch.manual_seed(0)
    truth = Adapter()
    for found in weights:
        np.testing.assert_array_equal(found["base.weight"], truth.base.weight.numpy())
        np.testing.assert_array_equal(found["base.bias"], truth.base.bias.numpy())
    exported = Adapter()
    exported.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"), strict=True)
    assert torch.equal(exported.base.weight, truth.base.weight)
    assert exported.calls == 3
    np.testing.assert_array_equal(exported.first.weight.detach().numpy(), weights[0]["first.weight"])


def export_twice(folder):
    case = Case()
    folder = Path(folder)
    with ds_pso.init(config(case, 2)) as swarm:
        engine, *_ = deepspeed.initialize(
            model=(model := Adapter()),
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=swarm.ds_config,
        )
        swarm.attach(engine)
        swarm.export(folder)


def test_an_export_replaces_old_weights_and_nothing_else(pool, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("old")
    pool.run(export_twice, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
