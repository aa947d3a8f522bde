"""A swarm on one rank: its parts, and the hooks on the DeepSpeed engine that it trains."""
