"""The main job: ``deepspeed --num_gpus 8 ds_pso/train.py --deepspeed_config config.json``."""

import os

# torch's stores print a C++ stack for every lost connection; the error that follows says who was lost.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from ds_pso.training.job import main

if __name__ == "__main__":
    raise SystemExit(main())
