"""The main job: ``deepspeed --num_gpus 8 ds_pso/train.py --deepspeed_config config.json``."""

from ds_pso.training.job import main

if __name__ == "__main__":
    raise SystemExit(main())
