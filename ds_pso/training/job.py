"""The main job, from arguments to summary; reads top to bottom like a script of one's own."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from pathlib import Path

import deepspeed
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

import ds_pso
from ds_pso.distributed import logs
from ds_pso.elastic.launch_env import ATTEMPT
from ds_pso.errors import CheckpointError, ConfigError, PeerError
from ds_pso.metrics import log
from ds_pso.report import write_loss_picture, write_report
from ds_pso.swarm import Swarm
from ds_pso.training.arguments import fill_auto, parse_arguments, read_deepspeed_config
from ds_pso.training.closing import generate_sample, summary
from ds_pso.training.model import HeldOut, TrainingEngine, build_model, causal_loss, load_tokenizer
from ds_pso.training.progress_bar import ProgressBar
from ds_pso.training.running_mean import RunningMean
from ds_pso.training.start import move_aside, run, write_record
from ds_pso.training.text import Corpus, load_corpus


def main(argv: list[str] | None = None) -> int:
    """Run the job; the exit code is 1 after an error that ds_pso foresaw, EXIT_PREEMPTED after a signal to end."""

    def body() -> int:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        logs.configure(arguments.verbose)
        config = read_deepspeed_config(arguments.deepspeed_config, int(os.environ.get("WORLD_SIZE", "1")))
        with ds_pso.init(config, run_dir=arguments.output_dir) as swarm:
            done = train(swarm, arguments)
        return 0 if done else ds_pso.EXIT_PREEMPTED

    return run(body)


def train(swarm: Swarm, arguments: argparse.Namespace) -> bool:
    """Run the job in this swarm: data, model, engine, loop, export. Returns false if a signal has ended it."""
    assert swarm.session.run_dir is not None
    arguments.output_dir = run_dir = swarm.session.run_dir
    arguments.resume = arguments.resume or _was_started_before(run_dir)
    _prepare_run_dir(swarm, arguments)
    fill_auto(swarm.ds_config, arguments.steps)
    _say(swarm, f"{swarm.describe()}; run folder {run_dir}")

    with swarm.world.coordinator.agree("loading the tokenizer"):
        tokenizer = load_tokenizer(arguments.model)
    corpus = load_corpus(swarm, arguments.dataset, run_dir / "data", arguments.seq_length, tokenizer)
    torch.manual_seed(arguments.seed)
    with swarm.world.coordinator.agree("building the model"):
        model = build_model(arguments.model, corpus.tokenizer, arguments.seq_length, swarm.ds_config)
    # DeepSpeed has its own words for what is wrong with the config.
    with swarm.world.coordinator.agree("deepspeed.initialize"):
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=swarm.ds_config)
    batch_size = engine.train_micro_batch_size_per_gpu()
    batches = swarm.config.per_particle  # each with its own number of samples
    smallest = min((entry.train_micro_batch_size_per_gpu or batch_size for entry in batches), default=batch_size)
    held_out = HeldOut(swarm, corpus.held_out, smallest, engine.device)
    swarm.attach(engine, probe=held_out.probe(engine))
    sampler = swarm.sampler(corpus.train, batch_size=batch_size, seed=arguments.seed)
    loader = DataLoader(corpus.train, batch_size=batch_size, sampler=sampler)
    # Dropout differs between ranks; the weights were made alike by attach.
    torch.manual_seed(arguments.seed + swarm.world.layout.rank)

    # A particle that joins an elastic swarm which is running begins where the others are.
    first_step = engine.global_steps
    if arguments.resume:
        first_step = swarm.load(run_dir / "checkpoints", reshape=arguments.reshape)
    if first_step >= arguments.steps and not _joins(swarm):
        raise ConfigError(f"--steps {arguments.steps}: the checkpoint has {first_step} steps already; ask for more")
    samples = engine.train_batch_size() * swarm.num_particles
    if batches:
        samples = sum(entry.samples_of_a_rank for entry in batches) * swarm.world.layout.particle_size
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    _say(
        swarm,
        f"{num_parameters / 1e6:.2f} M parameters; {len(corpus.train) * arguments.seq_length / 1e6:.2f} M training "
        f"tokens; {samples * arguments.seq_length} tokens a step",
    )
    if first_step == 0:
        swarm.log("held_out", losses=held_out.evaluate(engine))
    try:
        done = _loop(swarm, engine, loader, held_out, arguments, first_step)
    except PeerError:
        rescued = swarm.rescue(swarm.world.layout.particle_folder(run_dir) / "checkpoints")
        if rescued is not None and swarm.world.layout.shard_rank == 0:
            print(f"particle {swarm.particle} has saved {rescued}", flush=True)
        raise
    if done:
        _finish(swarm, engine, corpus, held_out, arguments, num_parameters)
    else:
        _say(
            swarm, f"stopped by a signal after step {engine.global_steps}, which is saved; --resume goes on from there"
        )
    return done


def _joins(swarm: Swarm) -> bool:
    """True if the others were there before, and perhaps have come to the end."""
    return swarm.world.membership.has_newer_state


def _was_started_before(run_dir: Path) -> bool:
    """True if ds-pso launch has started this particle again, and it had saved something."""
    return int(os.environ.get(ATTEMPT, "0")) > 0 and (run_dir / "checkpoints").is_dir()


def _loop(
    swarm: Swarm,
    engine: TrainingEngine,
    loader: DataLoader[Tensor],
    held_out: HeldOut,
    arguments: argparse.Namespace,
    first_step: int,
) -> bool:
    """Train to the last step, or to where a signal asks to stop; saved either way. Returns true if it is the last."""
    stop = swarm.should_stop()  # from here on SIGTERM, Ctrl-C and SIGHUP wait for the end of a step
    with ProgressBar(swarm, first_step, arguments.steps) as progress:
        step, losses = first_step, RunningMean()
        while step < arguments.steps and not stop:
            for batch in loader:  # one epoch, or what a checkpoint left of it
                loss = causal_loss(engine, batch.to(engine.device))
                engine.backward(loss)
                engine.step()
                losses.add(loss)
                if engine.global_steps == step:
                    continue  # gradients are still being accumulated
                step = engine.global_steps
                last = step >= arguments.steps
                if progress.wants_loss:
                    progress.step(float(loss.detach()))
                if last or step % arguments.eval_every == 0:
                    mean = losses.take()
                    swarm.log("train", losses=swarm.gather(mean))
                    evaluated = held_out.evaluate(engine)
                    swarm.log("held_out", losses=evaluated)
                    progress.evaluated(step, evaluated, mean)
                stop = swarm.should_stop() and not last
                if last or stop or (arguments.save_every and step % arguments.save_every == 0):
                    swarm.save(
                        arguments.output_dir / "checkpoints",
                        keep=arguments.keep_checkpoints or None,
                        background=not (last or stop or arguments.save_in_foreground),
                    )
                if last or stop:
                    break
    return step == arguments.steps


def _finish(
    swarm: Swarm,
    engine: TrainingEngine,
    corpus: Corpus,
    held_out: HeldOut,
    arguments: argparse.Namespace,
    num_parameters: int,
) -> None:
    run_dir: Path = arguments.output_dir
    exported = swarm.export(run_dir / "model", tokenizer=corpus.tokenizer)
    received = swarm.total_bytes()
    if not swarm.is_leader:
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(exported).to(engine.device).eval()
    last_loss = held_out.evaluate_whole(model)
    swarm.log("exported", losses=[last_loss])
    write_loss_picture(run_dir, run_dir / "loss.png")
    page = write_report([run_dir], images=False)
    gradient = next(p.dtype.itemsize for p in engine.module.parameters() if p.requires_grad)
    prompt = "def " if arguments.dataset == "python" else "The"
    print(
        summary(
            run_dir=run_dir,
            files={
                "resolved config": run_dir / "config.json",
                "losses, sync points, bytes": run_dir / "metrics.jsonl",
                "the losses as a picture": run_dir / "loss.png",
                "all of it as a page": page,
                "to continue with --resume": run_dir / "checkpoints",
                "from_pretrained opens it": exported,
            },
            first_loss=_first_held_out(run_dir / "metrics.jsonl"),
            last_loss=last_loss,
            sync_mode=swarm.config.sync_mode,
            swarm_bytes=received,
            # An all-reduce among P receives 2 N (P - 1) / P on each of P sides, whatever happens inside a particle.
            gradient_bytes=arguments.steps * 2 * (swarm.num_particles - 1) * num_parameters * gradient,
            sync_line=_sync_line(swarm),
            sample=generate_sample(model, corpus.tokenizer, prompt),
        ),
        flush=True,
    )


def _sync_line(swarm: Swarm) -> str:
    totals = swarm.totals
    if swarm.num_particles == 1:
        return f"{totals.count} sync points took {totals.seconds:.1f} s"
    waited = f"{totals.waited_s:.1f} s waiting for the slowest particle"
    if totals.overlapped_s:
        return (
            f"{totals.count} sync points held training up for {totals.seconds:.1f} s, and went on beside it for "
            f"{totals.overlapped_s:.1f} s; {waited}"
        )
    return f"{totals.count} sync points took {totals.seconds:.1f} s, of it {waited}"


def _first_held_out(path: Path) -> float:
    first = next(record for _, record in log.read_lines(path, log.Oddities(path)) if record["event"] == "held_out")
    losses = [math.nan if loss is None else loss for loss in first["losses"]]
    return sum(losses) / len(losses)


def _prepare_run_dir(swarm: Swarm, arguments: argparse.Namespace) -> None:
    """Keep what an earlier run left, unless it is to be continued; write the resolved config."""
    run_dir: Path = arguments.output_dir
    with swarm.world.coordinator.agree("preparing the run folder"):
        if not swarm.is_leader:
            return
        is_remote = swarm.config.remote_checkpoints is not None  # looked up when it is loaded
        if arguments.resume and not is_remote and not (run_dir / "checkpoints").is_dir():
            raise CheckpointError(f"{run_dir}: nothing to resume (no checkpoints folder); leave out --resume")
        started_again = int(os.environ.get(ATTEMPT, "0")) > 0
        if not arguments.resume and not started_again and (run_dir / "metrics.jsonl").exists():
            old = move_aside(run_dir)
            if swarm.session.lock is not None:
                swarm.session.lock.renamed(old)
        write_record(swarm, arguments)


def _say(swarm: Swarm, message: str) -> None:
    if swarm.is_leader:
        with contextlib.suppress(OSError):  # the terminal may be gone, and training is not to end by that
            print(message, flush=True)
