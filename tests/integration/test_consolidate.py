"""What is put together from a checkpoint on disk is what ``swarm.export`` wrote at the same step, bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pool import Pool
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM

import ds_pso
from ds_pso.checkpoint.format import record_checksum
from ds_pso.cli import main as cli
from ds_pso.export.offline import consolidate, find_checkpoint, write

from .jobs import Case, Net, assemble, build_engine, config, master_pieces, place, rank_batches
from .spoiled import Evil, seal
from .test_export import llama
from .test_publish import BF16_MASTERS

STEP = "step_00000003"


class Tied(nn.Module):
    """No Hugging Face model; two of its names are the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(7, 7), nn.Linear(7, 7, bias=False), nn.Linear(7, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def frozen() -> nn.Module:
    model = Net()
    model.norm.bias.requires_grad_(False)
    model.first.weight.requires_grad_(False)
    return model


def lora(base: nn.Module | None = None) -> nn.Module:
    base = llama(tied=False) if base is None else base
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def with_wrapped_layers(model: nn.Module, wrappers: Sequence[Callable[[nn.Module], nn.Module]]) -> nn.Module:
    """Wrap one layer after the other, each in its own way."""
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for index, wrap in zip(range(len(layers)), wrappers, strict=True):
            layers[index] = wrap(layers[index])
    return model


def wrapped_batch_norm() -> nn.Module:
    """Also of tensors that only a checkpoint of each rank holds."""
    model = Net(batch_norm=True)
    model.first, model.norm = compiled(model.first), checkpoint_wrapper(model.norm)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "batch_norm": lambda: Net(batch_norm=True),
    "frozen": frozen,
    "tied": Tied,
    "llama": lambda: llama(tied=False),
    "tied_llama": lambda: llama(tied=True),
    "lora_llama": lora,
    "compiled_llama": lambda: compiled(llama(tied=True)),
    "wrapped_layers_llama": lambda: with_wrapped_layers(llama(tied=False), (compiled, checkpoint_wrapper)),
    "checkpointed_llama": lambda: with_wrapped_layers(llama(tied=True), [checkpoint_wrapper] * 2),
    "checkpointed_lora_llama": lambda: with_wrapped_layers(lora(), [checkpoint_wrapper] * 2),
    "compiled_lora_llama": lambda: compiled(with_wrapped_layers(lora(), (checkpoint_wrapper, compiled))),
    "lora_in_compiled_llama": lambda: lora(compiled(llama(tied=False))),
    "wrapped_batch_norm": wrapped_batch_norm,
    "data_parallel_llama": lambda: nn.DataParallel(llama(tied=False)),
}


@dataclass(frozen=True)
class Job:
    case: Case
    model: str = "net"
    dead: tuple[int, ...] = field(default=())  # particles that have become NaN

    def __str__(self) -> str:
        dead = f"-dead{self.dead[0]}" if self.dead else ""
        return f"{self.case}-{self.model}{dead}{'-groups' if self.case.groups > 1 else ''}"


# A job for everything that is read in a way of its own, ...
JOBS = [
    Job(Case(stage=0, sync_mode="pso"), "batch_norm"),
    Job(Case(stage=0, precision="bf16", groups=2)),
    Job(Case(stage=1, precision="bf16", deepspeed={"data_types": {"grad_accum_dtype": "fp32"}}, groups=2)),
    Job(Case(stage=1), "frozen"),
    Job(Case(stage=2, sync_mode="easgd", precision="bf16", groups=2)),
    Job(Case(stage=2, precision="bf16"), "tied_llama"),
    Job(Case(stage=3, sync_mode="pso"), "batch_norm", dead=(1,)),
    Job(Case(stage=3), "frozen"),
    Job(Case(stage=3), "tied"),
    Job(Case(stage=3), "lora_llama"),
    Job(Case(stage=3, precision="bf16"), "checkpointed_lora_llama"),  # DeepSpeed has no compiled layers at ZeRO 3
    Job(Case(stage=1), "wrapped_batch_norm"),
]
# ... and other combinations.
MORE = [
    Job(Case(stage=1, sync_mode="pso"), "batch_norm", dead=(0,)),
    Job(Case(stage=2, sync_mode="pso"), "batch_norm"),
    Job(Case(stage=0, precision="bf16", fused=True, groups=2)),
    Job(Case(stage=2, precision="bf16", groups=2, deepspeed={"zero_optimization": {"round_robin_gradients": True}})),
    Job(Case(stage=3, precision="bf16", groups=2)),
    *(Job(Case(stage=stage, precision="bf16", deepspeed=BF16_MASTERS)) for stage in (1, 2, 3)),
    Job(Case(stage=0, sync_mode="easgd")),
    Job(Case(stage=3, sync_mode="easgd", groups=2)),
    *(Job(Case(stage=stage), "frozen") for stage in (0, 2)),
    *(Job(Case(stage=stage), "tied") for stage in (0, 2)),
    Job(Case(stage=0), "tied_llama"),
    Job(Case(stage=3, precision="bf16"), "llama"),
    *(Job(Case(stage=stage), "lora_llama") for stage in (0, 2)),
    *(Job(Case(stage=stage), "wrapped_layers_llama") for stage in (0, 1, 2)),
    Job(Case(stage=2), "compiled_llama"),  # what is compiled takes long
    *(Job(Case(stage=stage), "compiled_lora_llama") for stage in (0, 2)),
    Job(Case(stage=0), "lora_in_compiled_llama"),
    Job(Case(stage=2), "wrapped_batch_norm"),
    Job(Case(stage=3), "checkpointed_llama"),
    Job(Case(stage=1), "data_parallel_llama"),
]
ALL = [*JOBS, *(pytest.param(job, marks=pytest.mark.slow) for job in MORE)]


def loss_of(job: Job, engine: Any, step: int) -> Tensor:
    particle, rank, size = place(job.case)
    if job.model.endswith("llama"):
        tokens = torch.randint(
            0, 37, (2, 9), generator=torch.Generator().manual_seed(100 * particle + 10 * rank + step)
        )
        return engine(input_ids=tokens, labels=tokens).loss
    ((x, y),) = rank_batches(job.case, particle, rank, size, step)
    return nn.functional.mse_loss(engine(x.to(job.case.dtype)).float(), y)


def train_all(jobs: list[Job], folder: Path, tell: bool = True) -> list[Any]:
    """Each in a folder of its number: both exports, and a checkpoint. Returns pieces of the masters and the losses."""
    world, found = None, []
    for number, job in enumerate(jobs):
        swarm = ds_pso.init(config(job.case, place(job.case)[2]), world=world)
        world, here = swarm.world, folder / str(number)
        torch.manual_seed(0)
        engine = swarm.attach(build_engine(job.case, swarm.ds_config, MODELS[job.model]()))
        for step in range(3):  # a sync point after two of them
            engine.backward(loss_of(job, engine, step))
            engine.step()
        if swarm.particle in job.dead:
            swarm.session.synchronizer.parts.shards.tensors[0][:1].fill_(float("nan"))
        for which in ("consensus", "best"):
            swarm.export(here / which, which)
        swarm.save(here / "checkpoints")
        if tell:
            found.append((master_pieces(swarm), swarm.last_losses))
    if world is not None:
        world.close()
    return found


@dataclass(frozen=True)
class Runs:
    jobs: list[Job]
    folder: Path
    ranks: list[list[Any]]  # what each rank returned of each job

    def of(self, job: Job) -> Path:
        return self.folder / str(self.jobs.index(job))

    def returned(self, job: Job) -> list[Any]:
        return [rank[self.jobs.index(job)] for rank in self.ranks]


def run_all(jobs: list[Job], pool: Pool, factory: pytest.TempPathFactory) -> Runs:
    folder = factory.mktemp("runs")
    return Runs(jobs, folder, pool.run(train_all, jobs, folder, timeout=240))


@pytest.fixture(scope="module")
def runs(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_all(JOBS, pool, tmp_path_factory)


@pytest.fixture(scope="module")
def more_runs(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_all(MORE, pool, tmp_path_factory)


@pytest.fixture
def runs_of(request: pytest.FixtureRequest) -> Callable[[Job], Runs]:
    return lambda job: request.getfixturevalue("runs" if job in JOBS else "more_runs")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same_model(found: Path, expected: Path) -> None:
    assert files(found) == files(expected)
    (name,) = [path.name for path in expected.glob("*.safetensors")]
    ours, theirs = load_file(found / name), load_file(expected / name)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    for path in expected.glob("*.json"):
        assert unordered(found / path.name) == unordered(path), path.name


def unordered(path: Path) -> dict[str, Any]:
    """peft writes sets as lists."""
    return {k: sorted(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()}


@pytest.mark.parametrize("which", ["consensus", "best"])
@pytest.mark.parametrize("job", ALL, ids=str)
def test_it_is_what_was_exported(runs_of: Any, tmp_path: Path, job: Job, which: Any) -> None:
    run = runs_of(job).of(job)
    incomplete = write(consolidate(find_checkpoint(run), which), tmp_path / "model")
    assert (incomplete is None) == job.model.endswith("llama")
    assert_same_model(tmp_path / "model", run / which)


IS_WRAPPED = re.compile("compiled|wrapped|checkpointed|parallel")
WRAPPED = [job for job in JOBS if IS_WRAPPED.search(job.model)]
MORE_WRAPPED = [job for job in MORE if IS_WRAPPED.search(job.model)]


@pytest.mark.parametrize(
    "job", [*WRAPPED, *(pytest.param(job, marks=pytest.mark.slow) for job in MORE_WRAPPED)], ids=str
)
def test_a_wrapped_model_opens_as_the_one_inside(runs_of: Any, job: Job) -> None:
    """``from_pretrained`` would not complain of names that it does not find."""
    folder = runs_of(job).of(job) / "consensus"
    inside = {"wrapped_batch_norm": lambda: Net(batch_norm=True)}.get(
        job.model, lambda: llama(tied="lora" not in job.model)
    )()
    if "lora" in job.model:
        opened = PeftModel.from_pretrained(llama(tied=False), folder)
    elif job.model.endswith("llama"):
        opened, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
    else:
        opened = inside
        opened.load_state_dict(load_file(folder / "model.safetensors"))
    ranks = [pieces for pieces, _ in runs_of(job).returned(job)]
    trained = {plain(name): None for rank in ranks for name, _, _ in rank}
    found = {name: p.detach().float().numpy() for name, p in opened.named_parameters() if name in trained}
    assert found.keys() == trained.keys()
    assert found
    pieces = [[(plain(name), start, values) for name, start, values in rank] for rank in ranks]
    one, other = (assemble(pieces[start : start + 2], found) for start in (0, 2))
    for name, values in found.items():
        mean = torch.from_numpy((one[name] + other[name]) / 2).to(job.case.dtype).float()
        np.testing.assert_allclose(values, mean, rtol=1e-6, atol=1e-7, err_msg=name)


def plain(name: str) -> str:
    for part in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name.removeprefix("module.")


OTHER_WORLDS = [
    (Case(particles=3, stage=1), 3),
    (Case(particles=1, stage=0, sync_mode="allreduce"), 2),
    (Case(particles=1, stage=3), 2),
    (Case(stage=2, sync_mode="nosync", options={"asynchronous": True}, swarm={"total_steps": 4}), 4),
    (Case(stage=2, interval=2, swarm={"delay": 2, "wire": "int4"}), 4),  # saved while a sync point is pending
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "world_size"), OTHER_WORLDS, ids=str)
def test_other_worlds(pool: Pool, tmp_path: Path, case: Case, world_size: int) -> None:
    pool.run(train_all, [Job(case)], tmp_path, False, world_size=world_size)
    for which in ("consensus", "best"):
        model = consolidate(find_checkpoint(tmp_path / "0"), which)
        expected = load_file(tmp_path / "0" / which / "model.safetensors")
        assert model.state_dict.keys() == expected.keys()
        for name, tensor in expected.items():  # three numbers may be added in another order
            torch.testing.assert_close(model.state_dict[name], tensor, rtol=1e-6 if case.particles == 3 else 0, atol=0)


@pytest.mark.parametrize("job", [job for job in JOBS if job.model == "net"], ids=str)
def test_a_particle_alone(runs: Runs, job: Job) -> None:
    ranks = [pieces for pieces, _ in runs.returned(job)]
    like = {name: parameter.detach().numpy() for name, parameter in Net().named_parameters()}
    for particle in (0, 1):
        model = consolidate(find_checkpoint(runs.of(job)), particle)
        assert model.particles == (particle,)
        masters = assemble(ranks[2 * particle : 2 * particle + 2], like)
        assert model.state_dict.keys() == masters.keys()
        for name, tensor in model.state_dict.items():
            assert torch.equal(tensor, torch.from_numpy(masters[name]).to(job.case.dtype)), name


@pytest.mark.parametrize("job", [job for job in JOBS if job.dead], ids=str)
def test_the_dead_do_not_count(runs: Runs, job: Job) -> None:
    source = find_checkpoint(runs.of(job))
    living = 1 - job.dead[0]
    assert consolidate(source, "consensus").particles == consolidate(source, "best").particles == (living,)
    with pytest.raises(ds_pso.CheckpointError, match=f"particle {job.dead[0]} has no finite weights"):
        consolidate(source, job.dead[0])


def test_the_best_is_the_one_with_the_lowest_loss(runs: Runs) -> None:
    job = JOBS[0]
    _, losses = runs.returned(job)[0]
    assert losses[0] != losses[1]
    assert consolidate(find_checkpoint(runs.of(job)), "best").particles == (int(np.argmin(losses)),)


# -- the command ----------------------------------------------------------------------------------

LLAMA = next(job for job in JOBS if job.model == "tied_llama" and job.case.stage == 2)


def copy_of(runs: Runs, folder: Path, job: Job = LLAMA) -> Path:
    return Path(shutil.copytree(runs.of(job), folder / "run"))


def test_transformers_opens_it_with_the_tokenizer_of_the_run(runs: Runs, tmp_path: Path, capsys: Any) -> None:
    run = copy_of(runs, tmp_path)
    (run / "data/tokenizer").mkdir(parents=True)
    (run / "data/tokenizer/tokenizer.json").write_text("{}")
    (run / "data/tokenizer/tokenizer_config.json").write_text("{}")
    assert cli.main(["export", str(run)]) == 0
    model = run / f"model_{STEP}"
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"} <= set(files(model))
    opened = AutoModelForCausalLM.from_pretrained(model)
    assert opened.dtype == torch.bfloat16
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith(f"{model}: consensus of particles 0, 1 at step 3; ")
    assert lines[0].endswith(" M parameters and buffers, bfloat16")
    assert lines[1:] == ["from_pretrained opens it", f"with the tokenizer of {run / 'data/tokenizer'}"]


@pytest.mark.parametrize("given", ["", "checkpoints", f"checkpoints/{STEP}"])
def test_a_checkpoint_is_found_from_each_of_its_folders(runs: Runs, tmp_path: Path, given: str, capsys: Any) -> None:
    run = runs.of(LLAMA)
    argv = ["export", str(run / given), "--which", "best", "--output", str(tmp_path / "model")]
    assert cli.main(argv) == 0
    assert_same_model(tmp_path / "model", run / "best")


def test_a_folder_that_is_there_keeps_its_other_files(
    runs: Runs, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    for name in ("notes.txt", "model-00001-of-00002.safetensors", "config.json"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", str(runs.of(LLAMA)), "--output", "."]) == 0
    assert files(tmp_path) == ["config.json", "generation_config.json", "model.safetensors", "notes.txt"]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def test_a_module_that_is_not_of_hugging_face(runs: Runs, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["export", str(runs.of(JOBS[0])), "--particle", "1", "--output", str(tmp_path / "model")]) == 0
    assert files(tmp_path / "model") == ["model.safetensors"]
    out = capsys.readouterr().out
    assert ": particle 1 at step 3; " in out
    assert "model.safetensors alone: the module that was trained has no Hugging Face config\n" in out


def test_a_class_that_is_not_of_transformers(runs: Runs, tmp_path: Path, capsys: Any) -> None:
    run = copy_of(runs, tmp_path)
    for path in run.glob("checkpoints/step_*/particle_*/model/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mine", "architectures": ["Mine"]}))
        seal(run / "checkpoints" / STEP, path)
    assert cli.main(["export", str(run), "--output", str(tmp_path / "model")]) == 0
    assert "model.safetensors alone: its class is not one of transformers'" in capsys.readouterr().out
    assert files(tmp_path / "model") == ["config.json", "generation_config.json", "model.safetensors"]


def poison(source: Path) -> None:
    path = source / "particle_1/deepspeed/mp_rank_00_model_states.pt"
    torch.save({"module": Evil(str(source / "evil"))}, path)
    seal(source, path)


def truncate(source: Path) -> None:
    path = next(source.glob("particle_1/deepspeed/*zero_pp_rank_1*optim*"))
    path.write_bytes(path.read_bytes()[:100])


def flip(source: Path) -> None:
    path = next(source.glob("particle_0/deepspeed/mp_rank*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(key: str, value: Any) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        for path in source.glob("swarm/rank_*.json"):
            record = json.loads(path.read_text())
            del record["checksum"]
            record[key] = value
            path.write_text(json.dumps(record | {"checksum": record_checksum(record)}))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "no folder": (
        lambda source: shutil.rmtree(source.parents[1]),
        [],
        "run: no checkpoint to export; give a run folder",
    ),
    "no checkpoint": (
        lambda source: (source.parent / "latest").unlink(),
        [],
        "run: no checkpoint to export; give a run",
    ),
    "another tag": (lambda source: None, ["--tag", "step_00000099"], "name one of the step_* folders"),
    "not a tag": (lambda source: None, ["--tag", "../x"], "no such checkpoint"),
    "no such particle": (lambda source: None, ["--particle", "2"], "has particles 0 to 1"),
    "a negative particle": (lambda source: None, ["--particle", "-1"], "--particle -1: "),
    "a rank is missing": (
        lambda source: (source / "swarm/rank_00003.json").unlink(),
        [],
        "bring the files of all ranks",
    ),
    "cut short": (truncate, [], "so it was cut short or overwritten"),
    "bit flip": (flip, [], "damaged (checksum differs)"),
    "another format": (edit("format", 4), [], "format 4 is not 8; use the ds_pso that wrote it"),
    "an older record": (edit("shards", None), [], "does not say where the parameters of its engine lie"),
    "a pickle that runs code": (
        poison,
        [],
        f"it holds {open.__module__}.open, which is no plain data; no code of it was run",
    ),
    "output below a file": (
        lambda source: (source.parents[1] / "file").touch(),
        ["--output", "{run}/file/model"],
        "file/model: cannot be written (Not a directory); choose another folder",
    ),
    "output is a file": (
        lambda source: (source.parents[1] / "file").touch(),
        ["--output", "{run}/file"],
        "file: cannot be written (File exists); choose another folder",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_wrong_is_said_in_one_line(runs: Runs, tmp_path: Path, name: str, capsys: Any) -> None:
    damage, arguments, said = DAMAGE[name]
    run = copy_of(runs, tmp_path)
    damage(run / "checkpoints" / STEP)
    before = set(tmp_path.rglob("*"))
    assert cli.main(["export", str(run), *(word.format(run=run) for word in arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ds-pso: error: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before, "something was written, or code from the checkpoint was run"


def test_another_particle_may_be_damaged(runs: Runs, tmp_path: Path, capsys: Any) -> None:
    """Only what is needed is read: particle 0 can be had without particle 1."""
    run = copy_of(runs, tmp_path)
    truncate(run / "checkpoints" / STEP)
    assert cli.main(["export", str(run), "--particle", "0"]) == 0
    assert (run / f"model_{STEP}_particle_0/model.safetensors").is_file()
