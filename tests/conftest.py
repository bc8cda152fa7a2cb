"""Settings of every test run: one thread, reproducible examples, the installed package."""

import os

import pytest
import torch
from hypothesis import settings

# Children that a test starts in the clone import the installed package, as this process does, not the sources.
os.environ["PYTHONSAFEPATH"] = "1"

settings.register_profile("gunn_ext", derandomize=True, deadline=None, database=None)
settings.load_profile("gunn_ext")


@pytest.fixture(autouse=True)
def known_start():
    """Each test starts from one thread and the same random state, and may change both."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
