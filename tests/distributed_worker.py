"""What each process of a distributed test runs: `distributed_worker.py FOLDER JSON` trains the toy GPT-2 and writes
the weights that the optimizer holds, the log and the number of processes."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from tests.toys import gpt2, make_trainer, weights_of

if __name__ == "__main__":
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    trainer = make_trainer(folder, gpt2(), train_sampling_strategy="sequential", **settings)
    trainer.train()
    gathered = nullcontext()
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(trainer.model.parameters()))
    with gathered:
        weights = weights_of(trainer.model)
    if trainer.is_world_process_zero():
        torch.save((weights, trainer.state.log_history, trainer.args.world_size), folder / "out.pt")
    trainer.accelerator.end_training()  # gloo's threads abort a process that exits with its group
