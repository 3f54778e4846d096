"""Workloads, load generators, metrics, records, gates, statistics and reports."""
