"""Programs that answer one question each; their configurations are in ``conf/experiment``."""
