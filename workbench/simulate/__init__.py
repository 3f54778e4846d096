"""The engine's scheduler and caches without a model."""
