"""The main job: a causal language model trained by a swarm. Stands on the public API.

Knows models and data; must not know process groups or shards.
"""
