"""What each process of tests/test_ddp.py runs: `ddp_worker.py FOLDER JSON`, writes the weights of rank 0."""

import json
import sys
from pathlib import Path

import torch

from tests.toys import gpt2, make_trainer, weights_of

if __name__ == "__main__":
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    trainer = make_trainer(folder, gpt2(), train_sampling_strategy="sequential", **settings)
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save((weights_of(trainer.model), trainer.state.log_history, trainer.args.world_size), folder / "out.pt")
