"""The checks, the most important first, with what each needs. Light: bodies are imported where they run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that must hold on a device.

    Attributes:
        body: ``module:function`` in this folder; called on every rank, returns what was found in a few words. It
            raises ``NotTried`` where it cannot be asked, and anything else where it does not hold.
        says: what holds.
        ranks: processes, which share one GPU unless ``one_gpu_each``.
        limit_s: seconds after which it has failed.
    """

    body: str
    says: str
    ranks: int = 2
    limit_s: float = 60.0
    one_gpu_each: bool = False

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.body.partition(":")[2]


class NotTried(Exception):  # no error: a check that has nothing to ask here
    """Why a check cannot be made on this machine."""


CHECKS = [
    Check("training:rules", "ranks that share a GPU train as NumPy says: NCCL inside a particle, gloo between peers"),
    Check("training:fp32", "ZeRO 0 to 3 in fp32: a sync is the mean, and working weights are the masters"),
    Check("training:bf16", "the same in bf16: working weights are the cast of fp32 masters"),
    Check("training:fp16", "the same in fp16"),
    Check("training:loss_scaling", "fp16 with a loss scale that overflows: steps are skipped, and all stay equal"),
    Check("training:nccl", "the calls that peers make of NCCL, on a group of one rank", ranks=1),
    Check("training:background", "a sync beside training, on a stream of its own, ends in the same bits as one before"),
    Check("training:resume", "saved and resumed bit for bit, with dropout drawn on the device"),
    Check("training:one_particle", "one particle is plain DeepSpeed, bit for bit", ranks=1),
    Check("training:wires", "each wire format encodes and decodes as on a CPU, and leaves all particles equal"),
    Check("training:state_on_the_host", "state in pinned main memory ends in the same bits as on the device"),
    Check("training:cpu_offload", "optimizer and parameters offloaded to the CPU, with torch's Adam"),
    Check("training:muon", "Muon at ZeRO 1 to 3"),
    Check("features:export", "the exported model is the one in memory; transformers opens it"),
    Check("features:simulation", "two particles as threads of one process train as NumPy says", ranks=1),
    Check("features:hf_trainer", "the Hugging Face Trainer as a particle"),
    Check("features:accelerate_script", "a script under Accelerate with swarm.prepare, saved and exported"),
    Check("costs:memory", "a sync takes the memory that ds_pso.config.cost_model says", limit_s=90),
    Check("costs:exchange", "seconds of an exchange, by wire: in collectives, and beside them", limit_s=60),
    Check("costs:overlap", "seconds for which a sync holds training up, with a delay and without", limit_s=60),
    Check("training:fused_adam", "DeepSpeed's FusedAdam, compiled on the spot", limit_s=150),
    Check("training:cpu_adam", "DeepSpeed's Adam for offloaded optimizers, compiled on the spot", limit_s=150),
    Check("features:training_job", "ds_pso/train.py from text to an exported model", limit_s=90),
    Check("training:nvme_offload", "an optimizer on NVMe", limit_s=90),
    Check("costs:convergence", "a row of the comparison of rules, with larger models", ranks=1, limit_s=200),
    Check("training:ranks_over_gloo", "particles of two ranks that share a GPU, over gloo inside, too", ranks=4),
    Check("training:peers_over_nccl", "peers over NCCL, a GPU for each rank", one_gpu_each=True),
    Check("training:particles_over_nccl", "two particles of two ranks, NCCL everywhere", ranks=4, one_gpu_each=True),
    Check("features:marked_tests", "the tests of the suite that need a GPU", ranks=1),
]
# What no process here can ask.
OUT_OF_REACH = [
    "several machines; InfiniBand and other networks than this machine's own",
    "two NCCL communicators that are busy at the same time on several GPUs, as with a delay and peers over NCCL",
    "other GPUs than this one; AMD, Intel and other accelerators",
    "elastic swarms on GPUs, which exchange through gloo, as the checks above do",
]
