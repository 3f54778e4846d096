"""The host plans a step while the device runs the one before."""

from techniques.overlap.loop import OverlappedLoop

__all__ = ["OverlappedLoop"]
