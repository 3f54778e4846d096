"""The command line: run, fetch, list, doctor."""
