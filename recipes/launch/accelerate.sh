#!/usr/bin/env bash
# accelerate launch, once on every node with that node's NODE_RANK. ENGINE is a file of recipes/launch/accelerate:
# ddp, zero2, zero3, zero3_offload or fsdp2. Everything behind it is a recipe with its arguments.
#
#   ENGINE=fsdp2 NNODES=2 NODE_RANK=0 PROCESSES=8 MASTER_ADDR=node0 recipes/launch/accelerate.sh \
#     recipes/pretrain.py recipes/configs/c4_118m.yaml
set -euo pipefail

nodes="${NNODES:-1}"
exec python -m accelerate.commands.launch \
  --config_file="recipes/launch/accelerate/${ENGINE:-ddp}.yaml" \
  --num_machines="$nodes" \
  --machine_rank="${NODE_RANK:-0}" \
  --num_processes="$((nodes * ${PROCESSES:?how many on each node}))" \
  --main_process_ip="${MASTER_ADDR:-127.0.0.1}" \
  --main_process_port="${MASTER_PORT:-29500}" \
  "$@"
