#!/usr/bin/env bash
# A swarm of four processes on the CPU of this machine, two particles of two ranks; takes a minute or two.
#
#     launcher/cpu_quickstart.sh                        # train.py, 40 steps
#     launcher/cpu_quickstart.sh my_script.py --epochs 1
#
# NPROC_PER_NODE: number of processes (default: 4).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PATH="$root/.venv/bin:$PATH"
if [ $# -eq 0 ]; then
    set -- "$root/ds_pso/train.py" --deepspeed_config "$root/ds_config_examples/zero2_local_sgd.json" \
        --steps 40 --output_dir runs/cpu_quickstart
fi

export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
exec torchrun --standalone --nproc_per_node "${NPROC_PER_NODE:-4}" "$@"
