"""Breaks ds_pso on purpose, to see that the tests notice.

    python tests/sabotage.py              all of them, one line each
    python tests/sabotage.py skip_publish one

A sabotage is a function here that patches ds_pso inside the ranks of the pool (which call
``apply`` when DS_PSO_SABOTAGE names one); the tests themselves run unchanged. The result for each
stands in docs/testing.md.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SABOTAGES: dict[str, tuple[Callable[[], None], str]] = {}  # name -> (patch, test file that should notice)


def sabotage(noticed_by: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(patch: Callable[[], None]) -> Callable[[], None]:
        SABOTAGES[patch.__name__] = (patch, noticed_by)
        return patch

    return register


def apply(name: str) -> None:
    SABOTAGES[name][0]()


def rank() -> int:
    return int(os.environ["LOCAL_RANK"])


def do_nothing(*_: Any, **__: Any) -> None:
    pass


# -- shards -------------------------------------------------------------------------------------


@sabotage("integration/test_publish.py")
def skip_publish() -> None:
    """ZeRO 1 and 2 keep working with the weights from before the sync."""
    from ds_pso.shards.zero12 import Zero12Shards

    Zero12Shards.publish = do_nothing


@sabotage("integration/test_publish.py")
def publish_without_prologue() -> None:
    """ZeRO 3 without its first step: persistent parameters stay stale."""
    from ds_pso.shards.zero3 import Zero3Shards

    real = Zero3Shards.publish

    def publish(self: Any) -> None:
        self.optimizer.checkpoint_event_prologue = do_nothing
        real(self)

    Zero3Shards.publish = publish


@sabotage("integration/test_publish.py")
def keep_secondary_copies() -> None:
    """At hpZ the next forward pass finds copies of the weights from before the sync."""
    from ds_pso.shards.zero3 import Zero3Shards

    real = Zero3Shards.publish

    def publish(self: Any) -> None:
        self.optimizer.invalidate_secondary_tensor = do_nothing
        real(self)
        del self.optimizer.invalidate_secondary_tensor

    Zero3Shards.publish = publish


@sabotage("integration/test_publish.py")
def store_no_copies() -> None:
    """Masters in half precision stay as they were before the sync."""
    from ds_pso.shards.fp32_copies import Fp32Copies

    Fp32Copies.store = do_nothing


@sabotage("integration/test_publish.py")
def keep_copies_for_ever() -> None:
    """The fp32 copies of masters in half precision outlive the next step."""
    from ds_pso.shards.fp32_copies import Fp32Copies

    Fp32Copies.drop = do_nothing


@sabotage("integration/test_pipeline.py")
def leave_tied_weights_apart() -> None:
    """The copies of a tied weight in several stages are synced each by itself."""
    from ds_pso.shards.tied import TiedWeights

    TiedWeights.equalise = do_nothing


@sabotage("integration/test_pipeline.py")
def give_each_stage_its_own_data() -> None:
    """The sampler splits the data over the stages of a pipeline, too."""
    from ds_pso import swarm

    swarm.data_parallel_place = lambda session: (session.world.layout.rank, session.world.layout.world_size)


@sabotage("integration/test_padding.py")
def forget_padding() -> None:
    from ds_pso.shards.base import Shards

    Shards.zero_padding = do_nothing


@sabotage("integration/test_truth.py")
def shift_a_segment() -> None:
    """One parameter is believed to lie an element further on."""
    from dataclasses import replace

    from ds_pso.shards.zero12 import Zero12Shards

    real = Zero12Shards._find_segments

    def shifted(self: Any) -> Any:
        *first, last = real(self)
        return [*first, replace(last, shard_start=last.shard_start + 1)]

    Zero12Shards._find_segments = shifted


@sabotage("integration/test_moe.py")
def count_experts_from_zero() -> None:
    """Every rank calls its experts as DeepSpeed does, also where they are others than those of the next rank."""
    from ds_pso.shards import base, experts

    base.whole_parameters = lambda module: [experts.WholeParameter(n, p) for n, p in module.named_parameters()]


@sabotage("integration/test_moe.py")
def share_experts_with_all() -> None:
    """At ZeRO 0 the ranks of a particle send each other parts of experts that the others do not have."""
    from ds_pso.shards import replicated

    replicated.replicas_of = lambda parameter: None


@sabotage("integration/test_moe.py")
def leave_experts_in_their_files() -> None:
    """What DeepSpeed has not saved with the module is not read."""
    from ds_pso.checkpoint import deepspeed_reshard, reader

    reader.is_of_expert = deepspeed_reshard.is_of_expert = lambda path: False


@sabotage("integration/test_moe.py")
def compare_the_tokens_of_a_rank() -> None:
    """Tokens of the other ranks of a particle are not counted."""
    from ds_pso.sync.assessment import Assessor

    real = Assessor.report

    def report(self: Any, window: Any) -> Any:
        taken = self.expert_load.take() if self.expert_load is not None else []
        found = real(self, window)
        self._tokens = taken
        return found

    Assessor.report = report


# -- exchange -----------------------------------------------------------------------------------


@sabotage("integration/test_truth.py")
def swap_two_elements() -> None:
    """Particle 1 sends its buckets reversed."""
    from ds_pso.comm.exchange import Exchange

    real = Exchange._fill

    def fill(bucket: Any, pieces: Any, tensors: Any) -> None:
        real(bucket, pieces, tensors)
        if rank() >= 2:
            bucket.copy_(bucket.flip(0))

    Exchange._fill = staticmethod(fill)


@sabotage("integration/test_truth.py")
def drop_a_bucket() -> None:
    from ds_pso.comm import exchange

    real = exchange.plan_buckets
    exchange.plan_buckets = lambda *arguments: real(*arguments)[:1]


@sabotage("integration/test_wire.py")
def lose_the_residual() -> None:
    """What rounding loses is lost."""
    from ds_pso.comm.exchange import Exchange

    real = Exchange.mean_by_differences

    def mean_by_differences(self: Any, tensors: Any, weights: Any, differences: Any, *, feedback: bool) -> Any:
        yield from real(self, tensors, weights, differences, feedback=feedback)
        for residual in differences.residual:
            residual.zero_()

    Exchange.mean_by_differences = mean_by_differences


@sabotage("integration/test_wire.py")
def agree_on_nothing() -> None:
    """Differences stay relative to the last mean, where the rule has moved on from it."""
    from ds_pso.sync.update import Updater

    Updater._settle = do_nothing


@sabotage("integration/test_truth.py")
def leave_the_mean_short() -> None:
    """RDA does not stretch the mean."""
    from ds_pso.sync.direction_mean import DirectionMean

    DirectionMean.stretch = do_nothing


@sabotage("integration/test_truth.py")
def measure_a_part() -> None:
    """RDA takes the part of a matrix that lies on this rank for the whole."""
    from ds_pso.sync.direction_mean import DirectionMean

    real = DirectionMean.__init__

    def init(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        self._local = Alone()

    class Alone:
        def gather(self, values: Any) -> Any:
            return [list(values)]

    DirectionMean.__init__ = init


@sabotage("integration/test_sparse_ranks.py")
def send_the_first() -> None:
    """Not the largest elements of a chunk are sent, but the first ones."""
    import torch

    from ds_pso.comm.compression.sparse import Sparse

    real = Sparse._write

    def write(self: Any, blocks: Any, *codes: Any) -> None:
        first = torch.zeros_like(blocks)
        first[:, : self.kept] = blocks[:, : self.kept]
        real(self, first, *codes)

    Sparse._write = write


@sabotage("integration/test_sparse_ranks.py")
def count_the_silent() -> None:
    """Who has not sent an element counts in its mean, as zero."""
    from ds_pso.comm.compression.sparse import Sparse

    real = Sparse.add_sent

    def add_sent(self: Any, encoded: Any, weight: float, total: Any, weights: Any) -> None:
        real(self, encoded, weight, total, weights)
        weights.fill_(1.0)

    Sparse.add_sent = add_sent


@sabotage("integration/test_sparse_ranks.py")
def keep_nothing_in_the_weights() -> None:
    """What is not sent is taken from the weights, and kept nowhere."""
    from ds_pso.comm import exchange

    real = exchange._withhold

    def withhold(rest: Any, pieces: Any, differences: Any, scale: float) -> None:
        real(rest, pieces, differences, 0.0 if differences.in_weights else scale)

    exchange._withhold = withhold


@sabotage("integration/test_delay.py")
def forget_the_steps_meanwhile() -> None:
    """A delayed result replaces what was learned since the sync began."""
    from ds_pso.sync.overlapped import Overlap

    begin, apply_movement = Overlap.begin, Overlap._apply

    def begin_and_remember(self: Any, *arguments: Any) -> None:
        self.old = [x.clone() for x in self._parts.shards.tensors]
        begin(self, *arguments)

    def apply_to_the_old(self: Any, *arguments: Any) -> None:
        for x, old in zip(self._parts.shards.tensors, self.old, strict=True):
            x.copy_(old)
        apply_movement(self, *arguments)

    Overlap.begin, Overlap._apply = begin_and_remember, apply_to_the_old


@sabotage("integration/test_delay.py")
def wait_in_the_foreground() -> None:
    """A delayed sync point is waited for at once."""
    from ds_pso.sync.overlapped import Overlap

    real = Overlap.begin

    def begin(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        self._parts.world.background.settle()

    Overlap.begin = begin


@sabotage("integration/test_delay.py")
def count_lost_steps() -> None:
    """A particle that restarts late counts by the steps that were lost, too."""
    from ds_pso.sync.overlapped import Overlap

    real = Overlap._apply

    def apply_movement(self: Any, pending: Any, end: int, window: Any) -> None:
        steps = window.steps
        real(self, pending, end, window)
        window.steps = steps

    Overlap._apply = apply_movement


@sabotage("integration/test_expert_search.py")
def keep_the_last_combination() -> None:
    """After a search that has failed the experts are gone."""
    from ds_pso.session.expert_search import ParticleModels

    ParticleModels.give_back = do_nothing


@sabotage("integration/test_fragments.py")
def apply_fragments_together() -> None:
    """Each waits for the last one."""
    from ds_pso.sync.overlapped import PendingSync

    PendingSync.due = lambda self, fragment: self.begun + self.delay


@sabotage("integration/test_fragments.py")
def carry_nan_into_fragments() -> None:
    """A particle that is not alive takes its fragments one by one."""
    from ds_pso.sync.overlapped import Overlap

    real = Overlap._apply

    def apply_some(self: Any, pending: Any, end: int, window: Any) -> None:
        if pending.record.alive[self._parts.exchange.particle] or end == pending.fragments:
            real(self, pending, end, window)
            return
        fragments, (copies, _) = self._fragments_of(pending), self._split(pending)
        for number in range(pending.applied, end):
            for r, values in zip(fragments[number], copies[number], strict=True):
                r.of(self._parts.shards.tensors).copy_(values)
        pending.applied = end

    Overlap._apply = apply_some


@sabotage("integration/test_fragments.py")
def cut_the_shard() -> None:
    """A fragment is an equal part of what the rank owns, and no part of the model."""
    from ds_pso.shards.base import equal_parts
    from ds_pso.shards.fragments import Range
    from ds_pso.sync import parts

    def cut(shards: Any, count: int) -> Any:
        numels = [s.numel for s in shards.segments]
        return [
            [
                Range(s.shard, s.shard_start + start, s.shard_start + stop)
                for s, start, stop in ((shards.segments[i], start, stop) for i, start, stop in part)
            ]
            for part in equal_parts(numels, count)
        ]

    vars(parts)["cut"] = cut


@sabotage("integration/test_streaming.py")
def recover_only_the_fragment_in_turn() -> None:
    """A particle that is not alive waits for the other fragments until their turn comes."""
    import ds_pso.sync.overlapped

    vars(ds_pso.sync.overlapped)["all"] = lambda values: True  # are alive


@sabotage("integration/test_streaming.py")
def share_a_memory() -> None:
    """What a rule has noted of one fragment it takes for another's."""
    from ds_pso.sync.parts import SyncParts

    real = SyncParts.start_state

    def start(self: Any) -> None:
        real(self)
        self.memories = Shared(self.memories)

    class Shared(list):  # type: ignore[type-arg]
        def __setitem__(self, _: Any, value: Any) -> None:
            for index in range(len(self)):
                super().__setitem__(index, value)

    SyncParts.start_state = start


@sabotage("integration/test_state.py")
def round_positions() -> None:
    """Anchors are kept in bf16, too."""
    from ds_pso.utils.offload import Offload

    real = Offload.keep
    Offload.keep = lambda self, tensor, rough=False: real(self, tensor, rough=True)


@sabotage("integration/test_schedule.py")
def measure_the_second_half() -> None:
    """The drift is that of some elements only."""
    from ds_pso.sync.update import Updater

    real = Updater._measure
    Updater._measure = lambda self, x, received: real(self, x[len(x) // 2 :], received[len(x) // 2 :])


@sabotage("integration/test_schedule.py")
def decide_alone() -> None:
    """Each rank's schedule goes by the distance of its own shard."""
    import math

    from ds_pso.sync.assessment import Assessor

    Assessor.drift = lambda self, apart: math.sqrt(apart[0] / apart[1])


@sabotage("integration/test_resume.py")
def forget_the_residual() -> None:
    """The state of the wire is not in the checkpoint."""
    from ds_pso.checkpoint import loading, rank_state

    real = rank_state.own_tensors
    rank_state.own_tensors = loading.own_tensors = lambda swarm: {
        k: v for k, v in real(swarm).items() if "wire" not in k
    }


@sabotage("integration/test_bytes.py")
def count_bytes_wrong() -> None:
    from ds_pso.comm.collectives import Collectives

    real = Collectives.run
    Collectives.run = lambda self, name, start, received, prepare: real(self, name, start, received / 2, prepare)


@sabotage("faults/test_diverged_particles.py")
def mix_in_the_dead() -> None:
    """A particle of weight zero is multiplied by zero, not left out: zero times NaN is NaN."""
    import torch

    from ds_pso.comm.exchange import Exchange

    real = Exchange.weighted_mean

    def weighted_mean(self: Any, tensors: Any, weights: Any) -> Any:
        if weights[self.particle] == 0:
            weights = [torch.finfo(torch.float64).tiny if w == 0 else w for w in weights]
        return real(self, tensors, weights)

    Exchange.weighted_mean = weighted_mean


@sabotage("integration/test_truth.py")
def answer_oneself() -> None:
    """In a ring each particle receives its own shard."""
    from ds_pso.comm.exchange import Exchange

    real = Exchange.from_each

    def from_each(self: Any, tensors: Any, sources: Any) -> Any:
        return real(self, tensors, sources if len(set(sources)) == 1 else range(len(sources)))

    Exchange.from_each = from_each


@sabotage("faults/test_nobody_waits.py")
def wait_for_messages() -> None:
    """Asynchronous particles do not go on before a message has come."""
    import time

    from ds_pso.distributed.mailbox import GlooMailbox

    real = GlooMailbox.newest

    def newest(self: Any) -> Any:
        while (message := real(self)) is None:
            time.sleep(0.01)
        return message

    GlooMailbox.newest = newest


@sabotage("faults/test_nobody_waits.py")
def read_old_messages() -> None:
    from ds_pso.rules.nosync import NoSync

    NoSync.max_staleness = property(lambda self: 10**6 if self.options.asynchronous else None)


# -- moments and learning rates ------------------------------------------------------------------


@sabotage("integration/test_optimizer_state.py")
def average_moments_unevenly() -> None:
    """Their mean leans towards particle 0."""
    from ds_pso.sync.moments import Moments

    real = Moments.mean_of

    def mean_of(self: Any, moments: Any, weights: Any) -> None:
        first, *others = weights
        real(self, moments, (first + 0.01, others[0] - 0.01, *others[1:]))

    Moments.mean_of = mean_of


@sabotage("integration/test_optimizer_state.py")
def keep_moments_from_local_ranks() -> None:
    """At ZeRO 0 a rank averages its own part, and does not tell the others of its particle."""
    from ds_pso.shards.replicated import ReplicatedShards

    ReplicatedShards.publish_moments = do_nothing


@sabotage("integration/test_optimizer_state.py")
def compare_moments_of_local_ranks() -> None:
    """At ZeRO 0 ranks of a particle may hold different numbers of them, and then nothing is averaged."""
    from ds_pso.sync.moments import Moments

    real = Moments.agree

    def agree(self: Any) -> bool:
        counts = self._local.gather([float(len(self._shards.moments()))])
        return len({row[0] for row in counts}) == 1 and bool(real(self))

    Moments.agree = agree


@sabotage("integration/test_moments.py")
def average_moments_every_time() -> None:
    """Whatever their period says."""
    from ds_pso.sync.moment_options import KINDS, MomentOptions

    MomentOptions.due = lambda self, index: KINDS


@sabotage("integration/test_moments.py")
def forget_the_residual_of_moments() -> None:
    """What rounding takes away is lost."""
    from ds_pso.sync.moments import Moments

    real = Moments.mean_of

    def mean_of(self: Any, moments: Any, weights: Any) -> None:
        for residual in self.residuals().values():
            residual.zero_()
        real(self, moments, weights)

    Moments.mean_of = mean_of


@sabotage("integration/test_moments.py")
def divide_by_nothing() -> None:
    """First moments of others stay where this particle has no second one."""
    from ds_pso.sync.moments import Moments

    Moments.bound = do_nothing


@sabotage("integration/test_moments.py")
def move_late_moments_whole() -> None:
    """As weights are, whatever the steps since have left of what they were."""
    from ds_pso.sync.moments import Moments

    real = Moments.add_late
    Moments.add_late = lambda self, movement, steps: real(self, movement, 0)


@sabotage("integration/test_lr_factor.py")
def leave_the_rate_multiplied() -> None:
    """After a step the learning rate is not what the schedule said."""
    from ds_pso.shards.base import Shards

    Shards._restore_lr = do_nothing


@sabotage("integration/test_lr_factor.py")
def multiply_no_rate() -> None:
    from ds_pso.shards.base import Shards

    Shards.lr_factor = property(lambda self: self._lr_factor, lambda self, value: setattr(self, "_lr_factor", value))


# -- decisions ----------------------------------------------------------------------------------


@sabotage("integration/test_agreement.py")
def two_bests() -> None:
    """Particle 1 always takes itself for the best."""
    from ds_pso.rules import pso

    real = pso.best_of
    pso.best_of = lambda losses, alive: 1 if rank() >= 2 else real(losses, alive)


@sabotage("faults/test_quarantine.py")
def judge_nobody() -> None:
    """What is finite is well."""
    from ds_pso.sync import assessment
    from ds_pso.sync.health import Limits

    real = assessment.judge
    assessment.judge = lambda table, limits: real(table, Limits(None, None))


@sabotage("faults/test_damaged_links.py")
def believe_the_link() -> None:
    from ds_pso.utils.checksums import Added, Copied

    Added.damage = Copied.damage = lambda *_: ""


@sabotage("faults/test_damaged_links.py")
def repeat_alone() -> None:
    """Rank 3 judges by its own numbers, and so do the others by theirs."""
    from ds_pso.comm.collectives import Collectives

    Collectives._gather_rows = lambda self, name, row: [row] * self.world.layout.num_particles


@sabotage("integration/test_agreement.py")
def ties_to_the_higher_index() -> None:
    from ds_pso.rules import pso

    pso.best_of = lambda losses, alive: min(range(len(losses)), key=lambda i: (not alive[i], losses[i], -i))


@sabotage("integration/test_truth.py")
def random_factors_of_each_rank() -> None:
    from ds_pso.rules.pso import Pso

    real = Pso._draw
    Pso._draw = lambda self, index, particle, *more: real(self, index, particle + 10 * (rank() % 2), *more)


@sabotage("integration/test_agreement.py")
def fitness_of_one_rank() -> None:
    """A particle's loss is that of its first rank alone."""
    from ds_pso.sync.fitness import ParticleReport

    real = ParticleReport.combined
    ParticleReport.combined = lambda rows, steps: real(rows[:1], steps)


@sabotage("sync/test_fitness.py")
def divide_the_losses() -> None:
    """What counts is a micro-batch's part in the mean of its optimizer step, whoever has divided it."""
    from ds_pso.session.engine_hooks import EngineHooks

    real = EngineHooks.__init__

    def init(self: Any, session: Any, engine: Any) -> None:
        real(self, session, engine)
        add = session.window.add
        session.window.add = lambda loss, *more: add(loss / engine.gradient_accumulation_steps(), *more)

    EngineHooks.__init__ = init


@sabotage("integration/test_attach.py")
def start_apart() -> None:
    from ds_pso.comm.exchange import Exchange

    Exchange.from_one = lambda *_, **__: iter(())


@sabotage("integration/test_attach.py")
def leave_buffers_alone() -> None:
    from ds_pso.shards.base import Shards

    Shards.flat_buffers = lambda self: contextlib.nullcontext([])


@sabotage("integration/test_untrained.py")
def norm_with_the_buffers() -> None:
    """The norm of the weights is that of weights and buffers."""
    from dataclasses import replace

    from ds_pso.shards.base import Shards

    real = Shards.health

    def health(self: Any, part: Any) -> Any:
        found = real(self, part)
        return replace(found, square_norm=found.square_norm + found.buffers_square_norm)

    Shards.health = health


@sabotage("integration/test_untrained.py")
def divide_buffers_by_all() -> None:
    """The mean of the buffers is the sum over the living, divided by P."""
    from ds_pso.sync import synchronizer

    real = synchronizer.average
    synchronizer.average = lambda exchange, buffers, weights: real(
        exchange, buffers, [1 / len(weights) if weight else 0.0 for weight in weights]
    )


@sabotage("integration/test_untrained.py")
def copy_floats_alone() -> None:
    """What is not of a floating dtype is not copied at attach, nor compared."""
    from ds_pso.shards.untrained import Frozen

    real = Frozen.tensors
    Frozen.tensors = lambda self: {name: t for name, t in real(self).items() if t.is_floating_point()}


@sabotage("integration/test_untrained.py")
def compare_nothing_frozen() -> None:
    from ds_pso.shards.untrained import Frozen

    Frozen.digest_of_part = lambda self, number: 0.0


@sabotage("integration/test_untrained.py")
def average_constants() -> None:
    """Buffers are averaged, equal ones, too."""
    from ds_pso.comm.exchange import fill
    from ds_pso.sync import synchronizer

    synchronizer.average = lambda exchange, buffers, weights: fill(buffers, exchange.weighted_mean(buffers, weights))


@sabotage("integration/test_optimizer_state.py")
def zero_the_optimizer() -> None:
    """An optimizer that begins anew has zeros for all of its state."""
    from ds_pso.shards.optimizer_state import OptimizerState

    def reset(self: Any) -> None:
        for state in self._optimizer.state.values():
            for value in state.values():
                if hasattr(value, "zero_"):
                    value.zero_()

    OptimizerState.reset = reset


@sabotage("integration/test_partial_offload.py")
def look_at_one_optimizer() -> None:
    """Of two optimizers in a particle the swarm averages, resets and saves the state of the first."""
    from ds_pso.shards import complete_checkpoint, zero3

    complete_checkpoint.second_optimizer = zero3.second_optimizer = do_nothing


@sabotage("integration/test_attach.py")
def compare_no_models() -> None:
    from ds_pso.distributed.membership import StaticMembership

    real = StaticMembership.introduce
    StaticMembership.introduce = lambda self, fingerprint, section: real(self, "", section)


@sabotage("integration/test_plain_deepspeed.py")
def allreduce_in_particles() -> None:
    """``allreduce`` trains the particles that the JSON names, and never joins them."""
    from ds_pso import swarm

    swarm.ALLREDUCE = "something else"


@sabotage("integration/test_plain_deepspeed.py")
def draw_a_random_number() -> None:
    """Attaching takes one number from torch's random state."""
    import torch

    from ds_pso.swarm import Swarm

    real = Swarm.attach

    def attach(self: Any, *arguments: Any, **options: Any) -> Any:
        torch.rand(1)
        return real(self, *arguments, **options)

    Swarm.attach = attach


@sabotage("integration/test_scoring.py")
def score_before_publishing() -> None:
    """What is tried on the probe batch are the weights from before the sync point."""
    from ds_pso.sync.synchronizer import Synchronizer

    real = Synchronizer._follow_rule

    def follow(self: Any, *arguments: Any) -> Any:
        self.parts.shards.publish = do_nothing
        try:
            return real(self, *arguments)
        finally:
            del self.parts.shards.publish

    Synchronizer._follow_rule = follow


@sabotage("integration/test_scoring.py")
def score_of_one_rank() -> None:
    """A candidate's loss is that of the first rank's part of the batch."""
    from ds_pso.distributed.local_group import TorchLocalGroup
    from ds_pso.sync.assessment import Assessor

    real_score, real_gather = Assessor.score, TorchLocalGroup.gather

    def score(self: Any) -> Any:
        TorchLocalGroup.gather = lambda *arguments: real_gather(*arguments)[:1]
        try:
            return real_score(self)
        finally:
            TorchLocalGroup.gather = real_gather

    Assessor.score = score


@sabotage("integration/test_truth.py")
def tensors_of_each_rank() -> None:
    """With random factors for each tensor, each rank has its own idea of what a tensor is."""
    from ds_pso.rules.pso import Pso

    real = Pso._draw

    def draw(self: Any, index: int, particle: int, parameter: str | None = None) -> Any:
        return real(self, index, particle, parameter and f"{parameter} on rank {rank() % 2}")

    Pso._draw = draw


@sabotage("integration/test_consensus.py")
def stay_in_the_consensus() -> None:
    """Leaving the block gives the particle's own weights not back."""
    from ds_pso.sync import consensus

    calls = []
    real = consensus.replace

    def replace(targets: Any, values: Any) -> None:
        calls.append(None)
        if len(calls) % 2:  # on entering
            real(targets, values)

    consensus.replace = replace


@sabotage("integration/test_consensus.py")
def forget_the_center() -> None:
    """Elastic averaging exports the mean of the particles."""
    from ds_pso.rules.easgd import Easgd

    Easgd.model_in = "x"


@sabotage("integration/test_simulate.py")
def share_a_random_state() -> None:
    """Simulated particles draw from one another's random numbers."""
    from ds_pso.distributed import thread_scheduler as room

    room.set_process_state = do_nothing


# -- peers --------------------------------------------------------------------------------------


@sabotage("integration/test_truth.py")
def miss_a_barrier() -> None:
    """Rank 3 does not say that it is there."""
    from ds_pso.distributed.coordinator import StoreCoordinator

    real = StoreCoordinator.barrier
    StoreCoordinator.barrier = lambda self, label, ranks: None if rank() == 3 else real(self, label, ranks)


@sabotage("faults/test_lost_peers.py")
def trust_the_store() -> None:
    """Wait for the store without a limit of our own."""
    from ds_pso.distributed.coordinator import StoreCoordinator

    StoreCoordinator._ask = lambda self, question, limit_s: question()


# -- checkpoints and export ---------------------------------------------------------------------


@sabotage("integration/test_resume.py")
def restore_one_tensor_less() -> None:
    from ds_pso.checkpoint import loading

    real = loading.restore

    def restore(swarm: Any, record: Any, tensors: Any) -> None:
        last = list(loading.own_tensors(swarm))[-2]
        tensors[last] = loading.own_tensors(swarm)[last].clone()
        real(swarm, record, tensors)

    loading.restore = restore


@sabotage("integration/test_resume.py")
def forget_the_window() -> None:
    from ds_pso.checkpoint import loading

    real = loading.restore
    loading.restore = lambda swarm, record, tensors: real(swarm, record | {"window": [0.0, 0, 0, None]}, tensors)


@sabotage("integration/test_resume.py")
def forget_the_steps_of_the_window() -> None:
    from ds_pso.sync.fitness import FitnessWindow

    real = FitnessWindow.restore
    FitnessWindow.restore = lambda self, total, count, steps, first: real(self, total, count, 0, first)


@sabotage("integration/test_resume.py")
def forget_the_first_loss() -> None:
    """Later losses are judged by another one."""
    from ds_pso.sync.fitness import FitnessWindow

    real = FitnessWindow.restore
    FitnessWindow.restore = lambda self, total, count, steps, first: real(self, total, count, steps, None)


@sabotage("integration/test_resume.py")
def forget_the_highest_loss() -> None:
    from ds_pso.sync.synchronizer import Synchronizer

    real = Synchronizer.load_state_dict
    Synchronizer.load_state_dict = lambda self, state, *more: real(self, {**state, "highest_loss": float("nan")}, *more)


@sabotage("integration/test_resume.py")
def forget_the_data_position() -> None:
    from ds_pso.sampler import SwarmSampler

    SwarmSampler.load_state_dict = do_nothing


@sabotage("integration/test_resume.py")
def forget_the_random_state() -> None:
    from ds_pso.checkpoint import rank_state

    rank_state._restore_random = do_nothing


@sabotage("integration/test_resume.py")
def forget_the_rate_of_the_particle() -> None:
    from ds_pso.sync.synchronizer import Synchronizer

    real = Synchronizer.load_state_dict
    Synchronizer.load_state_dict = lambda self, state, *more: real(self, state | {"lr_factor": 1.0}, *more)


@sabotage("faults/test_bad_checkpoints.py")
def believe_every_file() -> None:
    from ds_pso.checkpoint import loading, recovery

    loading.check_files = recovery.check_files = do_nothing


@sabotage("faults/test_bad_checkpoints.py")
def load_before_checking() -> None:
    """Rank 0 begins to restore while the others still check."""
    from ds_pso.checkpoint import loading

    real = loading.check_files

    def check(files: Any, source: Path) -> None:
        import random

        random.seed(0)
        real(files, source)

    loading.check_files = check


@sabotage("faults/test_bad_checkpoints.py")
def save_in_place() -> None:
    """``latest`` moves before the checkpoint is complete."""
    from ds_pso.checkpoint import saving

    real = saving.write_part

    def write_part(folder: Path, *more: Any) -> None:
        (folder.parent / "latest").write_text(folder.name)
        real(folder, *more)

    saving.write_part = write_part


@sabotage("integration/test_background_save.py")
def write_what_has_changed() -> None:
    """What is written in the background is not copied before."""
    import torch

    from ds_pso.checkpoint.writer import Copies

    write = Copies.write

    def write_later(copies: Any) -> list[Path]:
        for content, path, zipped in copies.__dict__.pop("later", []):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            copies._scripts.append(lambda path=path: [path])
        return write(copies)

    Copies.add = lambda copies, *given: copies.__dict__.setdefault("later", []).append(given)
    Copies.write = write_later


@sabotage("integration/test_background_save.py")
def remove_old_ones_first() -> None:
    """Before the new checkpoint is complete."""
    from ds_pso.checkpoint import saving

    real = saving.complete

    def complete(temporary: Path, final: Path) -> None:
        import shutil

        for path in final.parent.glob("step_*"):
            shutil.rmtree(path)
        real(temporary, final)

    saving.complete = complete


@sabotage("integration/test_remote_checkpoints.py")
def declare_before_uploading() -> None:
    """The manifest is written before the files."""
    from ds_pso.checkpoint import uploading
    from ds_pso.checkpoint.remote import write_manifest

    real = uploading.make_room

    def make_room(remote: Any, name: str, known: int) -> None:
        real(remote, name, known)
        write_manifest(remote, name, {})

    uploading.make_room = make_room


@sabotage("integration/test_remote_checkpoints.py")
def upload_from_the_first_rank_alone() -> None:
    from ds_pso.utils.remote_folder import RemoteFolder

    if rank() > 0:
        RemoteFolder.put = do_nothing


@sabotage("faults/test_fallback.py")
def fall_back_alone() -> None:
    """Each rank believes what it has found itself."""
    from ds_pso.distributed.coordinator import StoreCoordinator

    real = StoreCoordinator.gather
    StoreCoordinator.gather = lambda self, label, value: (
        [value] if label == "checking a checkpoint" else real(self, label, value)
    )


@sabotage("integration/test_preemption.py")
def stop_at_a_step_of_ones_own() -> None:
    """Each rank stops after the step at which it learns of the signal."""
    from ds_pso.distributed.coordinator import StoreCoordinator

    real = StoreCoordinator.gather
    StoreCoordinator.gather = lambda self, label, value: [value] if "to stop" in label else real(self, label, value)


# -- other numbers of particles and ranks -------------------------------------------------------


@sabotage("integration/test_reshape.py")
def read_a_piece_too_early() -> None:
    """Of a parameter that several ranks have saved, the later runs are taken from an element too early."""
    from dataclasses import replace

    from ds_pso.checkpoint.reader import SavedParticle

    real = SavedParticle.open

    def shifted(*args: Any) -> Any:
        particle = real(*args)
        for pieces in particle.pieces.values():
            pieces[1:] = [replace(p, shard_start=max(0, p.shard_start - 1)) for p in pieces[1:]]
        return particle

    SavedParticle.open = shifted


@sabotage("integration/test_reshape.py")
def continue_particle_0() -> None:
    from ds_pso.checkpoint.reader import SavedParticle

    real = SavedParticle.open
    SavedParticle.open = lambda source, number, records: real(source, 0, records)


@sabotage("integration/test_reshape.py")
def leave_the_moments() -> None:
    from ds_pso.checkpoint.deepspeed_reshard import _Repartition

    _Repartition._moments = lambda *_: {}


@sabotage("integration/test_reshape.py")
def divide_the_momentum_of_matrices() -> None:
    """Muon's momentum is divided like the weights, where a rank needs that of whole matrices."""
    from ds_pso.checkpoint.deepspeed_reshard import _Repartition

    _Repartition._keeps_whole_matrices = lambda *_: False


@sabotage("integration/test_reshape.py")
def share_a_count_of_steps() -> None:
    from ds_pso.checkpoint import deepspeed_reshard

    class Copy:
        deepcopy = staticmethod(lambda value: value)

    deepspeed_reshard.copy = Copy


@sabotage("integration/test_reshape.py")
def begin_the_epoch_again() -> None:
    from ds_pso.sampler import SwarmSampler

    SwarmSampler.continued = lambda self, state, world_size: {**state, "batch": 0}


@sabotage("integration/test_reshape.py")
def keep_the_old_anchor() -> None:
    from ds_pso.sync.synchronizer import Synchronizer

    Synchronizer.begin_anew = lambda self, step: self.parts.schedule.begin(step)


@sabotage("integration/test_unequal_batches.py")
def count_all_alike() -> None:
    """Particles with larger batches have no more weight in a mean."""
    from dataclasses import replace

    from ds_pso.rules import SyncPoint

    real = SyncPoint.mean_weights
    SyncPoint.mean_weights = lambda self: real(replace(self, samples=()))  # type: ignore[method-assign]


@sabotage("integration/test_unequal_batches.py")
def share_data_alike() -> None:
    """Every rank takes its samples in turn, however large its batch is."""
    from ds_pso.sampler import SwarmSampler

    real = SwarmSampler.__init__

    def init(self: Any, *args: Any, share: Any = None, **kwargs: Any) -> None:
        real(self, *args, **kwargs)

    SwarmSampler.__init__ = init  # type: ignore[method-assign]


@sabotage("integration/test_export.py")
def export_the_mean_as_the_best() -> None:
    from ds_pso.rules import SyncPoint

    SyncPoint.best_weights = SyncPoint.mean_weights


# -- one particle ------------------------------------------------------------------------------


@sabotage("integration/test_one_particle.py")
def need_peers() -> None:
    """One particle is plain DeepSpeed, whatever its rule says."""
    from ds_pso.config.schema import SwarmConfig

    SwarmConfig.has_sync_points = lambda self, num_particles: num_particles > 1 and self.build_rule() is not None


@sabotage("integration/test_plain_deepspeed.py")
def act_alone_for_nothing() -> None:
    """An outer step that ends where the particle is is made all the same, and rounded."""
    from ds_pso.rules.diloco import DiLoCo

    DiLoCo.acts_alone = property(lambda self: True)


@sabotage("integration/test_one_particle.py")
def compress_for_nobody() -> None:
    """One particle rounds, and delays, what it sends to no one."""
    from ds_pso.config.schema import SwarmConfig

    SwarmConfig.without_peers = lambda self: self


@sabotage("integration/test_one_particle.py")
def keep_the_part_of_one_particle() -> None:
    """``engine.save_checkpoint`` of one particle holds nothing of its rule."""
    from ds_pso.checkpoint.engine_calls import EngineCheckpoints

    real = EngineCheckpoints._own
    EngineCheckpoints._own = lambda self, folder: real(self, folder) if self._session.num_particles > 1 else None


@sabotage("integration/test_one_particle.py")
def start_with_peers_only() -> None:
    """A start at which nobody takes over weights begins nothing."""
    from dataclasses import replace

    from ds_pso.distributed.membership import StaticMembership

    real = StaticMembership.start_quorum

    def start_quorum(self: Any, index: int, *, in_background: bool = False) -> Any:
        found = real(self, index, in_background=in_background)
        return replace(found, is_start=False) if found.is_start and not found.recovering else found

    StaticMembership.start_quorum = start_quorum


@sabotage("integration/test_one_particle.py")
def begin_the_rule_again() -> None:
    """Where one particle becomes several, its anchor and momentum are lost."""
    from ds_pso.checkpoint.reshard import Reshaped

    real = Reshaped._own_record

    def own_record(self: Any) -> Any:
        self.begins_anew = self.begins_anew or self._P == 1
        return real(self)

    Reshaped._own_record = own_record


# -- the HF Trainer ---------------------------------------------------------------------------


@sabotage("test_hf_trainer.py")
def split_over_the_particle_alone() -> None:
    """Every particle trains on all of the data, as Accelerate would have it."""
    from ds_pso.hf_trainer.callback import _ShardedData

    _ShardedData.sharded = lambda self, get_train_dataloader: get_train_dataloader


@sabotage("test_hf_trainer.py")
def let_each_find_its_own_best() -> None:
    """Metrics of an evaluation stay those of the particle."""
    from ds_pso.hf_trainer.callback import _Evaluation

    _Evaluation.averaged = lambda self, evaluation_loop: evaluation_loop


@sabotage("test_hf_trainer.py")
def load_the_best_without_its_rule() -> None:
    """What the rule keeps of the model stays that of the last step."""
    from ds_pso.hf_trainer.callback import _Checkpoints

    load = _Checkpoints.load
    _Checkpoints.load = lambda self, folder: 0 if self._trainer.state.best_model_checkpoint else load(self, folder)


@sabotage("test_hf_trainer.py")
def believe_the_pickles_of_a_trainer() -> None:
    """DeepSpeed unpickles what the Trainer resumes from as it likes."""
    from ds_pso.hf_trainer import callback

    callback.plain_data_only = contextlib.nullcontext


@sabotage("integration/test_consolidate.py")
def keep_the_names_of_wrappers() -> None:
    """A compiled model is exported under the names that torch.compile gives it, and nothing is compared."""
    from ds_pso.export import contents, live

    live.plain_name = lambda module, name: name
    contents.check_tensors = contents.check_files = do_nothing


# -- Accelerate -------------------------------------------------------------------------------


@sabotage("recipes/test_prepare.py")
def step_the_schedule_of_a_particle() -> None:
    from ds_pso import accelerate

    accelerate._ticks = lambda *args, **kwargs: None


@sabotage("recipes/test_prepare.py")
def shard_inside_the_particle() -> None:
    from ds_pso import accelerate

    accelerate._shard = lambda swarm, accelerator, loader, batch_size: accelerator.prepare(loader)
    accelerate._guard = lambda *args: None


@sabotage("recipes/test_prepare.py")
def save_states_into_one_folder() -> None:
    from ds_pso.accelerate import _Checkpoints

    _Checkpoints._own = lambda self, folder: folder and str(folder)


# -- elastic swarms -------------------------------------------------------------------------------


@sabotage("sync/test_undo.py")
def keep_half_an_exchange() -> None:
    """A sync point that was broken off is not undone."""
    from ds_pso.sync.rollback import Snapshot

    Snapshot.restore = do_nothing


@sabotage("sync/test_undo.py")
def recover_the_weights_alone() -> None:
    """Who is behind keeps its own state of rule and wire."""
    from ds_pso.sync import recovery

    recovery.shared_state = lambda updater: []


@sabotage("sync/test_undo.py")
def count_who_recovers() -> None:
    """It counts as alive at the sync at which it recovers."""
    from ds_pso.sync.fitness import ParticleReport

    ParticleReport.of_recovering = classmethod(lambda cls: cls(1.0, 1, 1.0, 1.0, steps=1))


@sabotage("sync/test_undo.py")
def recover_without_frozen_weights() -> None:
    """Who recovers keeps its own weights where they are not trained."""
    from ds_pso.sync.recovery import Recovery

    real = Recovery.recover

    def recover(self: Any, quorum: Any, *more: Any) -> int:
        shards = self._parts.shards
        shards.frozen = shards.frozen if quorum.is_start else list
        return int(real(self, quorum, *more))

    Recovery.recover = recover


@sabotage("sync/test_undo.py")
def undo_without_buffers() -> None:
    """Statistics of a sync that came to nothing stay."""
    from ds_pso.sync.synchronizer import Synchronizer

    real = Synchronizer._all_tensors

    def all_but_buffers(self: Any) -> Any:
        buffers = {buffer.data_ptr() for _, buffer in self.parts.shards.buffers()}
        return [tensor for tensor in real(self) if tensor.data_ptr() not in buffers]

    Synchronizer._all_tensors = all_but_buffers


@sabotage("sync/test_undo.py")
def undo_without_residuals() -> None:
    """What has gone out with a sync that came to nothing is not sent again."""
    from ds_pso.sync import overlapped, synchronizer

    synchronizer.residuals = overlapped.residuals = lambda updater: []


@sabotage("elastic/test_lighthouse.py")
def speak_for_a_stalled_thread() -> None:
    """The heartbeat goes on while the main thread hangs."""
    from ds_pso.elastic.lighthouse import QuorumClient

    QuorumClient.is_stalled = False


@sabotage("faults/test_rescue.py")
def fail_alone() -> None:
    """A rank that waits in vain for a peer does not tell its local ranks."""
    from ds_pso.distributed.coordinator import StoreCoordinator

    StoreCoordinator._barrier_with_local_ranks = lambda self, label, ranks, store: self.barrier(
        label, sorted({*ranks, *self.layout.local_ranks})
    )


# -- careless scripts ---------------------------------------------------------------------------


@sabotage("integration/test_careless.py")
def look_at_no_batch() -> None:
    """The particles have nothing to compare at their first sync."""
    from ds_pso.session.data_watch import DataWatch

    DataWatch._saw = lambda self, module, args, kwargs: None


@sabotage("integration/test_careless.py")
def leave_the_data_to_one_particle() -> None:
    """DeepSpeed's own loader is split over the ranks of a particle."""
    from ds_pso import swarm

    swarm.shard_training_data = do_nothing


@sabotage("integration/test_careless.py")
def wait_for_the_closed() -> None:
    """A particle that has closed is waited for as one that is slow."""
    from ds_pso.distributed.coordinator import StoreCoordinator

    StoreCoordinator._raise_if_closed = do_nothing


@sabotage("integration/test_careless.py")
def end_torchs_world_with_the_swarm() -> None:
    from ds_pso.distributed import torch_world

    torch_world.keep = lambda store: torch_world.dist.destroy_process_group()


@sabotage("integration/test_careless.py")
def forget_the_swarms_part() -> None:
    """The engine's own checkpoints hold nothing of the rule."""
    from ds_pso.checkpoint import engine_calls

    engine_calls.save_part = do_nothing
    engine_calls.check_part = do_nothing
    engine_calls.restore_part = do_nothing


# -- the job ------------------------------------------------------------------------------------


@sabotage("distributed/test_timeouts.py")
def double_the_timeouts() -> None:
    from ds_pso.distributed import static_world

    real = static_world.carve
    static_world.carve = lambda particles, *, peer_backend, timeout_s: real(
        particles, peer_backend=peer_backend, timeout_s=2 * timeout_s
    )


@sabotage("integration/test_run_folder.py")
def share_a_run_folder() -> None:
    """No run folder is locked."""
    from ds_pso import swarm

    swarm.lock_folder = lambda *_: None


@sabotage("training/test_running_mean.py")
def keep_every_loss() -> None:
    """Until the next evaluation."""
    from ds_pso.training.running_mean import RunningMean

    real, losses = RunningMean.add, []

    def add(self: Any, value: Any) -> None:
        losses.append(value.detach())
        real(self, value)

    RunningMean.add = add


@sabotage("integration/test_preemption.py")
def heed_sigterm_alone() -> None:
    """Ctrl-C and SIGHUP end a rank at once."""
    import signal

    from ds_pso.distributed import ending_signals

    ending_signals.SIGNALS = (signal.SIGTERM,)


# -- sequences and layers divided over ranks ----------------------------------------------------


@sabotage("integration/test_sequence_parallel.py")
def give_each_rank_its_own_samples() -> None:
    """Also the ranks of a sequence."""
    from ds_pso.session.session import Session

    Session.ranks_per_sample = 1


@sabotage("integration/test_sequence_parallel.py")
def believe_the_config() -> None:
    """Nobody asks the engine over how many ranks it divides sequences."""
    from ds_pso import swarm

    swarm.check_samples = do_nothing


@sabotage("integration/test_sequence_parallel.py")
def train_on_a_mesh() -> None:
    """The engine's groups are not looked at."""
    from ds_pso.shards import engine

    engine._parallelism_checks = lambda _: []


@sabotage("recipes/test_prepare_sequences.py")
def shift_the_labels_in_each_part() -> None:
    """The last token of a part does not learn the first of the next."""
    import torch

    from ds_pso.accelerate import SequencePart

    real = SequencePart.__call__

    def call(self: Any, samples: Any) -> Any:
        batch = real(self, samples)
        batch["shift_labels"] = torch.nn.functional.pad(batch["input_ids"], (0, 1), value=-100)[:, 1:].contiguous()
        return batch

    SequencePart.__call__ = call


@sabotage("integration/test_tensor_parallel.py")
def export_a_part() -> None:
    from ds_pso.export import live

    live.made_whole = lambda parameter, part: part


@sabotage("integration/test_tensor_parallel.py")
def add_up_the_parts() -> None:
    """The export reduces over all ranks of a particle, also those with other parts of a layer."""
    import torch.distributed as dist

    from ds_pso.export import live

    class Everybody:
        get_world_size = staticmethod(lambda group: dist.get_world_size())
        get_global_rank = staticmethod(lambda group, rank: rank)
        reduce = staticmethod(lambda tensor, target, group: dist.reduce(tensor, target))

    live.dist = Everybody


@sabotage("integration/test_tensor_parallel.py")
def count_parts_of_layers_alone() -> None:
    """The start record says how many parameters a rank has."""
    from ds_pso.session import session

    session.is_split = lambda parameter: False


# -- running them -------------------------------------------------------------------------------


def noticed(name: str) -> str | None:
    """The first test that fails under the sabotage; None if all of the file pass."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            tests / SABOTAGES[name][1],
        ],
        env=os.environ | {"DS_PSO_SABOTAGE": name},
        cwd=tests.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if re.search(rf"TypeError: {name}|sabotage\.py\", line \d+, in apply", done.stdout):
        raise RuntimeError(f"the sabotage {name} no longer fits the code it patches\n{done.stdout}")
    found = re.search(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", done.stdout, re.M)
    return found.group(1) if found else None


def main() -> None:
    for name in sys.argv[1:] or SABOTAGES:
        print(f"{name:32} {noticed(name) or 'NOT NOTICED'}", flush=True)


if __name__ == "__main__":
    main()
