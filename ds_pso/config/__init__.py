"""The ``swarm`` section of the JSON: its keys, what they exclude, and what a sync point costs.

Knows the rules' options; must not know engines, process groups or torch.
"""
