"""The two errors that a person who runs the framework meets, one for each non-zero exit code."""

from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def memory_named(stage: str) -> Iterator[None]:
    """Turn a GPU that has run out of memory inside the ``with`` into one line; torch's lists every process there is.

    Raises:
        RunError: It has.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for the sake of its name
            raise
        wanted = one_line(error).partition(". GPU ")[0].removesuffix(".")
        raise RunError(
            f"stage {stage!r}: {wanted}; take a smaller data.batch_size or data.eval_batch_tokens, or let fewer "
            "runs share the GPU"
        ) from error
