#!/usr/bin/env bash
# DeepSpeed's launcher, once, on the first node: it reaches the nodes of recipes/launch/hostfile by ssh without a
# password, where this folder and its environment have to lie at the same path. Behind it: a recipe with its arguments.
#
#   recipes/launch/deepspeed.sh recipes/pretrain.py recipes/configs/c4_118m.yaml --deepspeed recipes/launch/zero3.json
set -euo pipefail

exec deepspeed --no_local_rank \
  --hostfile="${HOSTFILE:-recipes/launch/hostfile}" \
  --master_port="${MASTER_PORT:-29500}" \
  "$@"
