"""The two errors that a person who runs the framework meets, one for each non-zero exit code."""


class ConfigError(ValueError):
    """The user's configuration or inputs are wrong: one line naming what and where. The command exits with 2."""


class RunError(RuntimeError):
    """Something failed while a run was under way: one line naming what and where. The command exits with 1."""
