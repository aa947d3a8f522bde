"""A sync point: when, who takes part, the rule's plan carried out, and what is undone if it fails.

Knows fitness, shards, exchange and rule; must not know ZeRO stages, backends or DeepSpeed.
"""
