"""The ``swarm`` section of the JSON: its keys, what they exclude, and what a sync point costs.

Knows the rules' options; must not know engines, process groups or torch.
"""

from ds_pso.config.load import ConfigSource, find_config, load_config

__all__ = ["ConfigSource", "find_config", "load_config"]
