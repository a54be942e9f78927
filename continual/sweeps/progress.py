"""What a person sees while a sweep is at work: a line for each stage of a cell, and between them what the cells do.

A cell is a process of its own, perhaps on another machine, so that all that is known of it is what lies in the sweep's
directory: the manifest and the scores of its run, and its log. They are looked at once a second. Imports no torch.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from tqdm import tqdm

from continual.errors import ConfigError, RunError
from continual.storage import manifest, records
from continual.storage.manifest import Manifest
from continual.storage.records import RecordError
from continual.sweeps.cells import CellRun, scores_after

_MOST_TASKS = 6
"""Scores of more tasks than these do not fit a line; their mean then stands for those learnt earlier."""
_MOST_CELLS = 3
"""As many cells are named in the line that says what they do."""
_LAST_BYTES = 4096
"""What a cell does is the end of its log."""
_QUIET_SECONDS = 30.0
"""Where there is no terminal, a line comes after so long a silence."""


class SweepProgress:
    """Looks at the cells while they run (use it in a ``with``), and tells what it sees.

    On a terminal a last line says what each cell does, every second; elsewhere such a line comes now and then.

    Args:
        cells: The cells to be run.
        num_jobs: How many run at a time.
    """

    def __init__(self, cells: Sequence[CellRun], num_jobs: int) -> None:
        self.cells, self.num_jobs = {cell.place: cell for cell in cells}, num_jobs
        self.names = dict(zip(self.cells, short_names(list(self.cells)), strict=True))
        self.num_stages = {cell.place: len(yaml.safe_load(cell.config)["stages"]) for cell in cells}
        self.told = dict.fromkeys(self.cells, -1)  # the last stage of each cell that was told of
        self._told_at: dict[str, float] = {}
        self._seconds: list[float] = []  # of the finished stages
        for place, state in ((place, _state(cell)) for place, cell in self.cells.items()):
            if state is not None:
                self.told[place] = state.finished_stage
                self._seconds += [seconds for stage, seconds in state.stage_seconds.items() if stage != "0"]
        self._running = set(self.cells)
        self._lock, self._over = threading.Lock(), threading.Event()

    def __enter__(self) -> SweepProgress:
        self._out, self._started, self._since = sys.stdout, time.monotonic(), time.time()
        self._bar = tqdm(bar_format="{desc}", leave=False, dynamic_ncols=True) if sys.stderr.isatty() else None
        self._say("After each stage the scores of the tasks learnt so far, in brackets the one just trained:")
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def end(self, place: str, line: str) -> None:
        """Tell that a cell has ended, after all that its stages have left to tell."""
        with self._lock:
            self._running.discard(place)
            self._look(self.cells[place])
            self._say(line)

    # -- looking ------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            with self._lock:
                for place in sorted(self._running):
                    self._look(self.cells[place])
                self._show()

    def _look(self, cell: CellRun) -> None:
        """Tell of the stages that a cell has finished since it was last looked at."""
        place, state = cell.place, _state(cell)
        if state is None:
            return
        for stage in range(self.told[place] + 1, state.finished_stage + 1):
            self.told[place], self._told_at[place] = stage, time.monotonic()
            if stage:
                self._seconds.append(state.stage_seconds[str(stage)])
            done = f"stage {stage} of {len(state.stages)}" if stage else "untrained"
            self._say(f"{self._clock()} {self.names[place]}, {done}: {_scores(cell, state, stage)}{self._time_left()}")

    def _time_left(self) -> str:
        """Return about how long it takes from here if stages to come are as long as finished ones; "" for unknown."""
        if not self._seconds or not self._running:
            return ""
        stage, now = mean(self._seconds), time.monotonic()
        lefts = [
            (self.num_stages[place] - max(self.told[place], 0)) * stage
            - min(now - self._told_at.get(place, now), stage)  # spent on the stage that is not finished
            for place in self._running
        ]
        left = max(sum(lefts) / self.num_jobs, *lefts, 0.0)
        return f"; about {tqdm.format_interval(left)} left" if left else ""

    def _clock(self) -> str:
        return f"[{tqdm.format_interval(time.monotonic() - self._started)}]"

    # -- telling ------------------------------------------------------------------------------------------------------

    def _say(self, line: str) -> None:
        """Print a line on standard output, above the last line of a terminal."""
        if self._bar is not None:
            self._bar.clear()
        print(line, file=self._out, flush=True)
        self._spoken = time.monotonic()

    def _show(self) -> None:
        """Say what the cells do: in a terminal's last line, or in a line of its own now and then."""
        if self._bar is None and time.monotonic() - self._spoken < _QUIET_SECONDS:
            return
        doing = [f"{self.names[place]}: {what}" for place in self.cells if (what := self._doing(place))]
        more = f" (and {len(doing) - _MOST_CELLS} more)" if len(doing) > _MOST_CELLS else ""
        line = f"{self._clock()} {' | '.join(doing[:_MOST_CELLS]) or 'starting'}{more}"
        if self._bar is not None:
            self._bar.set_description_str(line)
        else:
            print(line, file=sys.stderr, flush=True)
            self._spoken = time.monotonic()

    def _doing(self, place: str) -> str:
        """Return what a cell is doing; nothing for one that has not begun or has ended."""
        log = self.cells[place].log_path
        if place not in self._running or not log.is_file() or log.stat().st_mtime < self._since - 1:
            return ""
        return last_line(log) or "starting"


def short_names(places: list[str]) -> list[str]:
    """Return what cells are called, from their directories: the method alone where order and seed are one for all."""
    parts = [place.split("/")[1:] for place in places]
    alike = len({tuple(part[1:]) for part in parts}) == 1
    return [part[0] if alike else " ".join(part) for part in parts]


def last_line(log: Path) -> str:
    """Return the last line of a run's log, a bar's without its drawing: ``stage 1/3 family: train: 43%``."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - _LAST_BYTES))
        text = file.read().decode("utf-8", "replace").replace("\r", "\n")
    lines = [line for each in text.splitlines() if (line := " ".join(each.split()))]
    last = lines[-1] if lines else ""
    bar = re.match(r"(.*?\d+%)\|", last)
    return bar.group(1) if bar else last[:60]


def _state(cell: CellRun) -> Manifest | None:
    """Return the manifest of a cell's run; None where there is none yet, or none to be read."""
    try:
        return manifest.read(cell.run_dir)[0]
    except (ConfigError, RunError):
        return None


def _scores(cell: CellRun, state: Manifest, stage: int) -> str:
    """Return the scores of the tasks learnt so far (before the first stage: of all), the just-trained in brackets."""
    try:
        found = scores_after(state, records.read(cell.run_dir, "scores"), stage)
    except RecordError:
        return "its scores cannot be read"
    shown = {task: score for task, score in found.items() if stage == 0 or task in state.stages[:stage]}
    own = state.stages[stage - 1] if stage else ""
    told = [f"{task} [{score:.3f}]" if task == own else f"{task} {score:.3f}" for task, score in shown.items()]
    if len(told) > _MOST_TASKS:
        average = f"mean of {len(told)} tasks {mean(shown.values()):.3f}"
        told = [*(line for task, line in zip(shown, told, strict=True) if task == own), average]
    return ", ".join(told) or "no task is scored"
