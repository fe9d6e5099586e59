"""Every test runs offline, on the CPU unless HF_FSAM_TEST_DEVICE says otherwise, with one thread for each process."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers.utils import logging

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Accelerate collects garbage after each training, and would search all objects of torch and transformers, which
    is a quarter of the time of a short test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def said_anew() -> None:
    """What is said once in a process is said once in each test, whichever ran before it."""
    logging.get_logger("hf_fsam").warning_once.cache_clear()
