"""What stays is not swept again: engines collect garbage several times as they are built."""

from __future__ import annotations

import gc


def spare_the_collector() -> None:
    """Collections look at what is made from now on."""
    gc.collect()
    gc.freeze()
