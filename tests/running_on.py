"""Where tests run. Not in conftest.py: tests/bench has one too, and the name stands for one of them only."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
