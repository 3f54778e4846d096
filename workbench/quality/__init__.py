"""The quality of what an engine computes: perplexity of texts, and distance from another engine."""
