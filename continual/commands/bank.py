"""Look at, cut, roll back, export or score the growing bank of a run; its own folders are never changed.

    python -m continual.cli bank RUN list
    python -m continual.cli bank RUN drop STAGE
    python -m continual.cli bank RUN rollback STAGE
    python -m continual.cli bank RUN export STAGE --out DIR
    python -m continual.cli bank RUN score

Commands start from the bank after the run's last finished stage, RUN/adapters/stage-NN, and leave what they make in
RUN/bank, which later commands start from. The last line on standard output is the folder that was read or written.
Exit status as for continual.run.
"""

from __future__ import annotations

import argparse
import difflib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from continual.commands.terminal import OneLineParser
from continual.errors import ConfigError
from continual.storage import manifest
from continual.storage.files import atomic_directory, write_json
from continual.storage.lock import DirectoryLock
from continual.storage.manifest import Manifest

PROGRAM = "python -m continual.cli bank"
_CONFIG = "adapter_config.json"
STATE_NAME, GATE_NAME = "bank.json", "gate.safetensors"  # as in adapters.bank_folder, which it takes torch to import


def main(argv: Sequence[str]) -> Path:
    """Do what the command line says; return the folder that was read or written.

    Raises:
        ConfigError: There is no run, no bank or no such stage, or the folder to write exists; nothing was written.
    """
    arguments = _parse(argv)
    run_dir: Path = arguments.run
    state, text = manifest.read(run_dir)
    folder = current(run_dir, state)
    if arguments.command == "list":
        print(table(folder))
        return folder
    if arguments.command == "export":
        _require_stage(arguments.stage, list(_read(folder)["stages"]), folder)
        return export(folder, arguments.stage, arguments.out, text)
    with DirectoryLock(run_dir) as lock:
        lock.acquire()
        if arguments.command == "score":
            return _dated(score(lock, folder, state, text, arguments.accept_data), state)
        if arguments.command == "rollback":
            return _dated(rollback(run_dir, state, arguments.stage), state)
        _require_stage(arguments.stage, list(_read(folder)["stages"]), folder)
        return _dated(drop(folder, arguments.stage, run_dir / "bank"), state)


def _dated(folder: Path, state: Manifest) -> Path:
    """Note in a bank folder after which of the run's stages it was made."""
    write_json(folder / STATE_NAME, _read(folder) | {"after_stage": state.finished_stage})
    return folder


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    description = "\n".join(str(__doc__).splitlines()[:1])
    parser = OneLineParser(prog=PROGRAM, description=description, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=OneLineParser)
    for name, what in (
        ("list", "the stages, the slices that they use, and what each keeps"),
        ("drop", "forget a stage, and the slices that no other stage uses"),
        ("rollback", "go back to the bank as it was after a stage"),
        ("export", "write a stage alone, as a bank and, where it is one slice, as a PEFT adapter"),
        ("score", "score the test rows of all tasks"),
    ):
        command = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        if name not in ("list", "score"):
            command.add_argument("stage", metavar="STAGE", help="the stage's name")
        if name == "score":
            command.add_accept_data()
        if name == "export":
            command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    return parser.parse_args(argv)


def current(run_dir: Path, state: Manifest) -> Path:
    """Return the folder of the bank that a command starts from.

    Raises:
        ConfigError: No stage is finished, the run keeps no bank, or RUN/bank is from before its last stage.
    """
    if state.finished_stage < 1:
        raise ConfigError(f"{run_dir} has no bank yet: its first stage is not finished")
    kept = run_dir / "adapters" / f"stage-{state.finished_stage:02d}"
    if not (kept / STATE_NAME).is_file():
        raise ConfigError(f"{run_dir} keeps no growing bank: its strategy is {state.model.get('strategy', 'unknown')}")
    if not (edited := run_dir / "bank").exists():
        return kept
    after = _read(edited).get("after_stage")
    if after != state.finished_stage:
        raise ConfigError(
            f"{edited} was made after stage {after}, and {state.finished_stage} are finished: move it away"
        )
    return edited


# -- commands ---------------------------------------------------------------------------------------------------------


def table(folder: Path) -> str:
    """Return the bank in ``folder`` as text: a line a stage."""
    from safetensors import safe_open

    state = _read(folder)
    sizes: dict[str, int] = {}
    for name in [*state["slices"], "gate"]:
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        if name == "gate":
            anchors = {stage: _count(shapes, f"{stage}|") for stage in state["stages"]}
            common = _count(shapes, "") - sum(anchors.values())
        else:
            sizes[name] = _count(shapes, "")
    width = max(5, *map(len, state["stages"]))
    lines = [f"{'stage':<{width}}  {'numbers':>9}  {'anchors':>8}  {'own rows':>8}  slices"]
    for stage, slices in state["stages"].items():
        share = state["notes"].get(stage, {}).get("home")
        own_rows = "-" if share is None else f"{share:.1%}"
        others = [other for other, used in state["stages"].items() if other != stage and set(used) & set(slices)]
        shared = f" (shared with {', '.join(others)})" if others else ""
        own = sum(sizes[name] for name in slices)
        lines.append(f"{stage:<{width}}  {own:>9,}  {anchors[stage]:>8,}  {own_rows:>8}  {' + '.join(slices)}{shared}")
    total = sum(sizes.values()) + sum(anchors.values()) + common
    lines.append(
        f"slices: {len(sizes)}, of {sum(sizes.values()):,} numbers; {total:,} in all, the gate's covariance in"
    )
    return "\n".join(lines)


def drop(folder: Path, stage: str, out: Path) -> Path:
    """Write to ``out`` the bank in ``folder`` without a stage and without the slices that it alone uses.

    Raises:
        ConfigError: The stage is the only one.
    """
    state = _read(folder)
    if len(state["stages"]) == 1:
        raise ConfigError(f"{stage!r} is the last stage of the bank in {folder}: a bank of none answers nothing")
    left = [name for name in state["stages"] if name != stage]
    unused = _keep(folder, left, out)
    print(f"dropped {stage}" + (f" and its slice {', '.join(unused)}" if unused else "; other stages use its slices"))
    return out


def rollback(run_dir: Path, state: Manifest, stage: str) -> Path:
    """Make RUN/bank the bank as it was after ``stage``."""
    finished = state.stages[: state.finished_stage]
    _require_stage(stage, finished, run_dir)
    folder = run_dir / "adapters" / f"stage-{finished.index(stage) + 1:02d}"
    _read(folder)
    with atomic_directory(run_dir / "bank") as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
    print(f"back to the bank after {stage}")
    return run_dir / "bank"


def export(folder: Path, stage: str, out: Path, text: str) -> Path:
    """Write to ``out`` the bank in ``folder`` with one stage alone; its slice, if it is one, as out/adapter too.

    Args:
        folder: A bank folder.
        stage: One of its stages.
        out: The folder to make.
        text: The run's configuration, whose backbone a PEFT folder needs.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: name another --out")
    manifest.check_new(out)
    slices = _read(folder)["stages"][stage]
    _keep(folder, [stage], out, (lambda made: _write_adapter(made, slices[0], text)) if len(slices) == 1 else None)
    return out


def score(lock: DirectoryLock, folder: Path, state: Manifest, text: str, accept_data: bool) -> Path:
    """Score the test rows of all tasks with a bank; write RUN/bank with the tables scores and answers.

    The labels seen (metric accuracy_seen) are those of all stages that the run has finished, whatever was dropped.
    """
    from continual.commands.bank_scores import BankScores
    from continual.config import experiment
    from continual.storage import records

    run_dir = lock.directory
    made = experiment.parse(text, state.run, where=str(run_dir / manifest.CONFIG_NAME))
    made.wordings, made.general_ability = None, False
    loop = BankScores(made, run_dir, folder)
    loop.lock = lock
    scores = loop.score(state, accept_data)
    with atomic_directory(run_dir / "bank") as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.parquet"))
        records.append(temporary, "scores", scores.rows)
        records.append(temporary, "answers", scores.answers)
    return run_dir / "bank"


# -- what they share --------------------------------------------------------------------------------------------------


def _keep(folder: Path, stages: list[str], out: Path, more: Callable[[Path], None] | None = None) -> list[str]:
    """Write to ``out`` the bank in ``folder`` with some of its stages; return the slices that none of them uses."""
    from safetensors.torch import load_file, save_file

    state = _read(folder)
    used = {name for stage in stages for name in state["stages"][stage]}
    gone = {f"{stage}|" for stage in state["stages"] if stage not in stages}
    gate = load_file(folder / GATE_NAME)
    with atomic_directory(out) as temporary:
        for name in [f"{name}.safetensors" for name in state["slices"] if name in used] + [_CONFIG]:
            shutil.copyfile(folder / name, temporary / name)
        kept = {key: tensor for key, tensor in gate.items() if f"{key.rpartition('|')[0]}|" not in gone}
        save_file(kept, temporary / GATE_NAME)
        cut = {
            key: {stage: state[key][stage] for stage in stages if stage in state[key]} for key in ("stages", "notes")
        }
        new = state | cut | {"slices": [name for name in state["slices"] if name in used]}
        (temporary / STATE_NAME).write_text(json.dumps(new, indent=1), encoding="utf-8")
        if more is not None:
            more(temporary)
    return [name for name in state["slices"] if name not in used]


def _write_adapter(folder: Path, name: str, text: str) -> None:
    """Write the slice ``name`` of the bank in ``folder`` as a PEFT folder of its own, folder/adapter."""
    from continual.adapters import load_bank
    from continual.config import experiment

    backbone: Any = experiment.parse(text, "export").model.backbone.build()
    model = load_bank(backbone, folder)
    model.save_pretrained(str(folder / "adapter"), selected_adapters=[name], save_embedding_layers=False)
    if (nested := folder / "adapter" / name).is_dir():  # where PEFT puts all adapters but its first
        for path in nested.iterdir():
            path.rename(folder / "adapter" / path.name)
        nested.rmdir()


def _read(folder: Path) -> dict[str, Any]:
    from continual.adapters.growing.bank_folder import read_state

    return read_state(folder)


def _require_stage(stage: str, known: Sequence[str], where: Path) -> None:
    if stage in known:
        return
    near = difflib.get_close_matches(stage, known, n=3, cutoff=0.4) or list(known)[:8]
    raise ConfigError(f"{where} has no stage {stage!r} in its bank; did you mean {' or '.join(map(repr, near))}?")


def _count(shapes: dict[str, list[int]], prefix: str) -> int:
    """Return how many numbers the tensors have whose names start with ``prefix``."""
    import math

    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))
