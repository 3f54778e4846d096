"""Inference workbench: one engine in which every optimisation is a part that can be taken out."""

from __future__ import annotations

__version__ = "0.1.0"
