"""Other engines behind the same Backend protocol."""
