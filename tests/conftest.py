"""Every test runs offline, on the CPU unless HF_FSAM_TEST_DEVICE says otherwise, with one thread for each process."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)
