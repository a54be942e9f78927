"""Continual learning of language models: one adapter, stage after stage."""

import os

# Read when pyarrow is imported: its own allocator keeps what writing a table took, megabytes more with every stage.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
