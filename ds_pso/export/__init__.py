"""One Hugging Face model out of a swarm: from live shards, or from a checkpoint on disk.

Knows sessions, checkpoints and transformers; must not know ZeRO stages or backends.
"""
