"""Saves a whole swarm so that it resumes bit for bit, and refuses what does not fit.

Layout of a checkpoint folder::

    latest                      name of the newest complete checkpoint
    step_00000064/
        particle_0/deepspeed/   DeepSpeed's own checkpoint of particle 0
        particle_0/model/       its Hugging Face config, if it has one
        particle_1/deepspeed/
        swarm/rank_00000.json          this rank's counters, random state, data position, file hashes
        swarm/rank_00000.safetensors   its rule state (velocity, anchor, ...), buffers, torch's random state

Everything is written to ``.step_00000064.tmp`` and renamed when all ranks are done; only then
does ``latest`` move. Where the HF Trainer has written a particle's checkpoint, ``swarm/`` is put beside it.
"""

from ds_pso.checkpoint.loading import check_part, load, load_part
from ds_pso.checkpoint.saving import save, save_part

__all__ = ["check_part", "load", "load_part", "save", "save_part"]
