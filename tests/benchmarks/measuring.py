"""What all benchmarks share: subjects timed in turn, ratios of what lies side by side, results as JSON and a table."""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from continual.storage import manifest


@dataclass(frozen=True)
class Setting:
    """How benchmarks are run.

    Attributes:
        device: Where the models are.
        tiny: Whether sizes are such that everything takes seconds: to see that it works, not how fast it is.
        seed: Decides weights, rows and tokens.
        rounds: Rounds in which all subjects take their turn; None for a benchmark's own choice.
        only: Words that the names of the cases to measure have in them.
    """

    device: torch.device
    tiny: bool = False
    seed: int = 0
    rounds: int | None = None
    only: str = ""

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def num_rounds(self, usual: int) -> int:
        """Return how many rounds to make where ``usual`` are made."""
        return self.rounds or (1 if self.tiny else usual)

    def wants(self, case: str) -> bool:
        """Say whether a case is to be measured."""
        return all(word in case for word in self.only.split())

    def pick(self, cuda: Any, cpu: Any, tiny: Any) -> Any:
        """Return the one of three values that this setting takes."""
        return tiny if self.tiny else cuda if self.cuda else cpu


@dataclass
class Result:
    """One figure.

    Attributes:
        suite: The benchmark.
        case: What was measured, in few words.
        measure: The figure's name.
        value: The figure; the median where rounds were made.
        unit: Its unit; "" for a ratio or a share.
        low: Lower quartile over the rounds; None where there were none.
        high: Upper quartile.
        rounds: How many rounds there were.
        goal: What is wanted of it, "<= 1.1" say; None for nothing.
        detail: Shapes, dtypes and whatever the figure was computed from.
    """

    suite: str
    case: str
    measure: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    rounds: int = 1
    goal: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        if self.goal is None:
            return None
        sign, bound = self.goal.split()
        return self.value <= float(bound) if sign == "<=" else self.value >= float(bound)

    def line(self, setting: Setting) -> str:
        """Return the figure as a line of JSON, with what it depends on."""
        about = {"tiny": setting.tiny, "seed": setting.seed, "environment": environment(setting.device)}
        return json.dumps(asdict(self) | {"met": None if setting.tiny else self.met} | about)


class Timings:
    """Seconds that each subject took in each round.

    Attributes:
        seconds: Subject -> seconds a call, one number a round.
        peak_bytes: Subject -> memory at its peak, its own models and optimizer included and no other subject's; empty
            on a CPU and where nobody asked.
        clock: "wall" or "processor".
    """

    def __init__(self, seconds: Mapping[str, list[float]], peak_bytes: Mapping[str, int], clock: str) -> None:
        self.seconds, self.peak_bytes, self.clock = dict(seconds), dict(peak_bytes), clock

    def median(self, name: str) -> float:
        """Return a subject's median seconds a call."""
        return statistics.median(self.seconds[name])

    def ratio(self, first: str, second: str) -> dict[str, Any]:
        """Return what ``Result`` wants of seconds of ``first`` / seconds of ``second``, paired round by round."""
        pairs = zip(self.seconds[first], self.seconds[second], strict=True)
        return spread([a / b for a, b in pairs])

    def detail(self) -> dict[str, Any]:
        """Return what ratios were computed from."""
        medians = {name: self.median(name) for name in self.seconds}
        return {"median_seconds": medians, "clock": self.clock, "peak_bytes": self.peak_bytes}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median, quartiles and count of the rounds' values, as ``Result`` names them."""
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"value": statistics.median(values), "low": quarters[0], "high": quarters[2], "rounds": len(values)}


class Stand:
    """Subjects that take turns on one device.

    Each is built by a function that returns what one call of it does, so that memory can be told apart.

    Args:
        device: Where they are.
        wall: Whether the clock on the wall counts on a CPU too: where other processes are what is timed.
    """

    def __init__(self, device: torch.device, wall: bool = False) -> None:
        self.device, self.wall = device, wall or device.type == "cuda"
        self._calls: dict[str, Callable[[], Any]] = {}
        self._resident: dict[str, int] = {}
        # What matrix products work in on a GPU, on the way back too, would else be the first subject's memory.
        with torch.inference_mode(False), torch.enable_grad():
            square = torch.ones(64, 64, device=device, requires_grad=True)
            torch.nn.functional.linear(square, square, square[0]).sum().backward()

    def add(self, name: str, build: Callable[[], Callable[[], Any]], warm_up: int = 2) -> None:
        """Build a subject and let it warm up."""
        before = self._allocated()
        self._calls[name] = call = build()
        for _ in range(warm_up):
            call()
        self._resident[name] = self._allocated() - before
        if self.device.type == "cuda":  # what warming up took and gave back is there for the next
            torch.cuda.empty_cache()

    def run(self, rounds: int, repeats: int = 1, peaks: bool = False) -> Timings:
        """Let all subjects take turns, the order reversed every other round; each turn is ``repeats`` calls.

        On a GPU the clock on the wall counts, from one synchronisation to the next; on a CPU the processor time of this
        process, so that a machine that others use as well is no matter. ``peaks`` asks for memory too, on a GPU, for
        one call more of each.
        """
        clock = time.perf_counter if self.wall else time.process_time
        seconds: dict[str, list[float]] = {name: [] for name in self._calls}
        names = list(self._calls)
        peak_bytes = {name: self._peak(name) for name in names} if peaks and self.device.type == "cuda" else {}
        for index in range(rounds):
            for name in names if index % 2 == 0 else reversed(names):
                call = self._calls[name]
                self._wait()
                began = clock()
                for _ in range(repeats):
                    call()
                self._wait()
                seconds[name].append((clock() - began) / repeats)
        return Timings(seconds, peak_bytes, "wall" if self.wall else "processor")

    def _peak(self, name: str) -> int:
        """Return the bytes that one call of a subject takes at its peak, what it holds between calls included.

        Nothing is cached when it begins: of a block that another subject left, all would count where a part is used.
        """
        torch.cuda.empty_cache()
        start = self._allocated()
        torch.cuda.reset_peak_memory_stats(self.device)
        self._calls[name]()
        self._wait()
        return self._resident[name] + torch.cuda.max_memory_allocated(self.device) - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _allocated(self) -> int:
        self._wait()
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


@functools.cache
def environment(device: torch.device) -> dict[str, Any]:
    """Return hardware, versions and threads."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    machine = {"hardware": hardware, "cores": os.cpu_count(), "platform": platform.platform()}
    return manifest.environment(str(device), 1) | machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not a Linux
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(results: Sequence[Result], setting: Setting) -> str:
    """Return results as lines of text, one each, under a heading; figures of tiny sizes are not judged."""
    heading = ("suite", "case", "measure", "value", "quartiles", "goal", "")
    rows: list[tuple[str, ...]] = [heading]
    for result in results:
        between = "" if result.low is None else f"{result.low:.4g} to {result.high:.4g}"
        verdict = {None: "", True: "met", False: "MISSED"}[None if setting.tiny else result.met]
        value = f"{result.value:.4g} {result.unit}".strip()
        rows.append((result.suite, result.case, result.measure, value, between, result.goal or "", verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
