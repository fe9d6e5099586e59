#!/usr/bin/env bash
# torchrun, once on every node with that node's NODE_RANK. Everything behind it is a recipe with its arguments.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 recipes/launch/torchrun.sh \
#     recipes/pretrain.py recipes/configs/c4_118m.yaml --deepspeed recipes/launch/zero3.json
#
# FSDP2 in place of --deepspeed: --fsdp true --fsdp_config recipes/launch/fsdp2.json. Neither of them: DDP.
set -euo pipefail

exec python -m torch.distributed.run \
  --nnodes="${NNODES:-1}" \
  --node_rank="${NODE_RANK:-0}" \
  --nproc_per_node="${PROCESSES:-gpu}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" \
  --master_port="${MASTER_PORT:-29500}" \
  "$@"
