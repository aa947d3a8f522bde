"""Saves a whole swarm so that it resumes bit for bit, and refuses what does not fit.

Knows the parts of a session and DeepSpeed's files; must not know peers or backends. The folder: ``format.py``.
"""

from ds_pso.checkpoint.loading import check_part, load, load_part
from ds_pso.checkpoint.saving import save, save_part
from ds_pso.checkpoint.uploading import finish_uploads

__all__ = ["check_part", "finish_uploads", "load", "load_part", "save", "save_part"]
