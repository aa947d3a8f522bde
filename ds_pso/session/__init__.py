"""A swarm on one rank: its parts, and the hooks on the DeepSpeed engine that it trains.

Knows the engine and how parts are built from the config; must not know process groups.
"""
