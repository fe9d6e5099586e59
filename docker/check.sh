#!/usr/bin/env bash
# Builds the image, trains in it under an id that it has no name for, stops the container and looks for the checkpoint.
# Needs Docker and no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

outputs="$(mktemp -d)"
trap 'docker rm --force hf-fsam-check > /dev/null || true; rm -rf "$outputs"' EXIT

docker build -t hf-fsam .
docker run --detach --name hf-fsam-check --user "$(id -u):$(id -g)" --ipc=host -v "$outputs:/app/outputs" \
  hf-fsam recipes/configs/pretrain_tiny.yaml --max_steps 100000 --logging_steps 1 --disable_tqdm true

until docker logs hf-fsam-check 2>&1 | grep "'loss'" > /dev/null; do
  if [[ "$(docker inspect --format '{{.State.Running}}' hf-fsam-check)" == false ]]; then
    docker logs hf-fsam-check
    exit 1
  fi
  sleep 1
done
docker stop -t 120 hf-fsam-check
ls "$outputs"/pretrain_tiny/checkpoint-*/trainer_state.json # the Trainer writes it last
