"""What every test stands on: one thread per worker, no network, fixed seeds, and Triton's interpreter without a GPU."""

from __future__ import annotations

import os
import random

# Read once, when torch and huggingface_hub are imported; child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy
import pytest
import torch
from hypothesis import settings

# `import torch` leaves Triton alone, so this is still in time; transformers would import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

# Loaded machines make deadlines lie, and a run that found a bug must find it again.
settings.register_profile("hasten", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("hasten")

DEVICES_NEEDED = {"gpu": 1, "multigpu": 2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs more CUDA devices than there are."""
    present = torch.cuda.device_count()
    for item in items:
        for marker, needed in DEVICES_NEEDED.items():
            if present < needed and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"needs CUDA devices: {needed}, present: {present}"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Give every test the same random numbers, alone or among others."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
