"""Who the ranks are and how they find each other: layout, stores, barriers, worlds of processes or threads.

Knows torch.distributed and the launcher's environment; must not know DeepSpeed, rules or models.
"""
