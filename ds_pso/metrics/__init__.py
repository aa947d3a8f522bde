"""The log of a run: ``metrics.jsonl`` and DeepSpeed's own monitor. Must not import torch."""
