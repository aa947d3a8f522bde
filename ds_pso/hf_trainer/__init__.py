"""The Hugging Face ``Trainer`` as a particle, and tools that sit on it.

Knows transformers, Accelerate and the public swarm; must not know shards or process groups.
"""

from ds_pso.hf_trainer.callback import SwarmCallback

__all__ = ["SwarmCallback"]
