"""A swarm whose particles are jobs of their own: they may die, stall, come back and join while the others train.

The lighthouse of torchft says who is there; everything that particles do together happens at sync points, and what
fails there is undone and tried again with those who are left.
"""
