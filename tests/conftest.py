"""One torch thread for all tests: tiny models gain nothing from more, and timings vary less."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
