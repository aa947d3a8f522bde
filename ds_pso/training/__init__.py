"""The main job: a causal language model trained by a swarm. Everything here stands on the public API."""
