"""The loop over stages, and the bounds beside a run: what turns a checked configuration into a run directory."""
