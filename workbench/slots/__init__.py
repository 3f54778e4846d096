"""The slots of the engine: one file a slot, its interface and its null object."""
