"""Models: where weights come from and how they become a decoder."""
