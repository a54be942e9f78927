"""Rows as a model takes them: prompts, token ids, batches, and the data module of one stage."""
