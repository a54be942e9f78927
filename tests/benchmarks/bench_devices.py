"""A training stage on two devices against one, by Lightning's DDP: rows a second, each device with as many rows a step.

Processes of one device and of two are all there from the start and take turns; those that wait do nothing.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import IO, Any, cast

import torch
from measuring import Result, Setting, spread
from subjects import TEXT_LENGTHS, RandomText, ShapedLM, backbone_dtype, queryable, sequence

from continual.module import ContinualModule
from continual.quiet import quieten


def run(setting: Setting) -> Iterator[Result]:
    """Time both; nothing on a machine with fewer than two GPUs."""
    shape = setting.pick("qwen2.5-0.5b", "smollm2-short", "tiny")
    case = f"{shape} two devices"
    if not setting.wants(case) or (setting.cuda and torch.cuda.device_count() < 2):
        return
    rows, steps = setting.pick(16, 4, 2), setting.pick(60, 4, 2)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with ExitStack() as stack:
        stages = {number: stack.enter_context(Group(setting, shape, number, rows, steps)) for number in seconds}
        for turn in range(setting.num_rounds(5)):
            for number in seconds if turn % 2 == 0 else reversed(seconds):
                seconds[number].append(stages[number].stage())
    pairs = zip(seconds[1], seconds[2], strict=True)
    detail = {"shape": shape, "rows_a_device": rows, "steps": steps, "seconds": seconds, "strategy": "ddp"}
    detail |= {"backbone_dtype": backbone_dtype(setting), "adapter": "float32", "clock": "wall"}
    detail["rows_a_second"] = {number: number * rows * steps / min(each) for number, each in seconds.items()}
    ratio = spread([2 * one / two for one, two in pairs])
    yield Result(
        "devices", case, "rows a second / one device's", **ratio, goal=">= 1.8" if setting.cuda else None, detail=detail
    )


class Group:
    """The processes of one run, one a device, each waiting to be told to train a stage.

    Args:
        setting: Device and seed.
        shape: The backbone's.
        number: Of devices.
        rows: Rows a device and step.
        steps: Steps a stage.
    """

    def __init__(self, setting: Setting, shape: str, number: int, rows: int, steps: int) -> None:
        arguments = [setting.device.type, shape, number, rows, steps, setting.seed]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        paths = [str(Path(__file__).parent), os.getcwd(), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, *map(str, arguments)],
                env=environment | (address | {"LOCAL_RANK": str(rank)} if number > 1 else {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(number)
        ]

    def __enter__(self) -> Group:
        return self

    def stage(self) -> float:
        """Train a stage; return the first process's seconds."""
        for process in self.processes:
            stdin = cast(IO[str], process.stdin)
            stdin.write("train\n")
            stdin.flush()
        found = [cast(IO[str], process.stdout).readline() for process in self.processes]
        if not all(found):
            raise RuntimeError("a process of the benchmark has ended; its error is above")
        return float(found[0])

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def wait_and_train(device: str, shape: str, number: int, rows: int, steps: int, seed: int) -> None:
    """Make the run ready, warm up, then train a stage for every line of standard input, telling its seconds."""
    setting, out = Setting(torch.device(device), seed=seed), sys.stdout
    module = ContinualModule(ShapedLM(shape, seed, backbone_dtype(setting)), queryable())
    lengths = [TEXT_LENGTHS[index % len(TEXT_LENGTHS)] for index in range(number * rows * steps)]
    data = {"batch_size": number * rows, "max_tokens": 512}
    trainer: dict[str, Any] = {"devices": number, "strategy": "ddp"} if number > 1 else {"devices": 1}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):
        stages = sequence(setting, Path(folder) / "run", module, [RandomText(lengths, seed=seed)], data, trainer)
        stages._fit(1)
        for _ in sys.stdin:
            seconds = _timed(lambda: stages._fit(1), setting)
            print(seconds, file=out, flush=True)


def _timed(call: Callable[[], Any], setting: Setting) -> float:
    started = time.perf_counter()
    call()
    if setting.cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    quieten()
    torch.set_num_threads(1)
    wait_and_train(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
