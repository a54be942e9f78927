"""The two errors that a person who runs the framework meets, one for each non-zero exit code."""


class ConfigError(ValueError):
    """The user's configuration or inputs are wrong: one line naming what and where. The command exits with 2."""


class RunError(RuntimeError):
    """Something failed while a run was under way: one line naming what and where. The command exits with 1."""


DIVERGED = "the loss is not finite"
"""Stands in the line of a RunError whose stage could not be trained with these settings, on any machine."""


def one_line(error: BaseException, limit: int | None = None) -> str:
    """Return an error's message on one line, cut to ``limit`` characters; its class where it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if limit is None or len(text) <= limit else text[: limit - 3] + "..."
