"""The main job: ``deepspeed --num_gpus 8 ds_pso/train.py --deepspeed_config config.json``."""

import os
import sys
from pathlib import Path

# A script's folder is first on sys.path. Here that is the package itself, whose folders (config, utils, metrics, ...)
# would hide modules of the same names from everybody else's imports.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
# torch's stores print a C++ stack for every lost connection; the error that follows says who was lost.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from ds_pso.training.job import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
