"""The data that flows: requests, batches, step outputs, records. Imports nothing of ours."""
