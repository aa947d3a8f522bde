#!/usr/bin/env bash
# A swarm on two machines, each of them a particle. Start it on both; the order does not matter:
#
#     MASTER_ADDR=10.0.0.1 NODE_RANK=0 launcher/two_nodes.sh    # on the machine with this address
#     MASTER_ADDR=10.0.0.1 NODE_RANK=1 launcher/two_nodes.sh    # on the other one
#
# With arguments it starts another script: ... launcher/two_nodes.sh my_script.py --epochs 1
#
# MASTER_PORT: a free port of the first machine (default: 29500).
# NPROC_PER_NODE: processes on each machine, the same on both (default: one per GPU; without any, two).
# NNODES: number of machines (default: 2).
# Where a machine has several networks, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the one to use.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PATH="$root/.venv/bin:$PATH"
: "${MASTER_ADDR:?set it to the address of the first machine, as the others reach it}"
: "${NODE_RANK:?set it to 0 on the first machine, 1 on the second}"
if [ $# -eq 0 ]; then
    set -- "$root/ds_pso/train.py" --deepspeed_config "$root/ds_config_examples/zero2_node_particles.json"
fi

gpus=$( (nvidia-smi -L 2>/dev/null || true) | wc -l)
if [ "$gpus" -eq 0 ]; then gpus=2; fi
exec torchrun --nnodes "${NNODES:-2}" --node_rank "$NODE_RANK" --nproc_per_node "${NPROC_PER_NODE:-$gpus}" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" "$@"
