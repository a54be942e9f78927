"""A training stage on two devices against one, by Lightning's DDP: rows a second, each device with as many rows a step.

Processes of one device and of two are all there from the start and take turns; those that wait do nothing.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from measuring import Result, Setting, Stand
from subjects import STAGE_ROWS, TEXT_LENGTHS, RandomText, ShapedLM, backbone_dtype, queryable, sequence

from continual.module import ContinualModule
from continual.quiet import quieten


def run(setting: Setting) -> Iterator[Result]:
    """Time both; nothing on a machine with fewer than two GPUs."""
    shape = setting.pick("qwen2.5-0.5b", "smollm2-short", "tiny")
    case = f"{shape} two devices"
    if not setting.wants(case) or (setting.cuda and torch.cuda.device_count() < 2):
        return
    rows = setting.pick(16, 4, 2)
    steps = setting.pick(math.ceil(STAGE_ROWS / (2 * rows)), 4, 2)
    stand = Stand(setting.device, wall=True)
    with ExitStack() as stack:
        # The same rows in all: two devices make half of the steps.
        groups = [stack.enter_context(Group(setting, shape, number, rows, 2 * steps // number)) for number in (1, 2)]
        for name, group in zip(("one", "two"), groups, strict=True):
            stand.add(name, lambda group=group: group.train, warm_up=1)
        timings = stand.run(setting.num_rounds(5))
    detail = {"shape": shape, "rows_a_device": rows, "rows": 2 * rows * steps, "strategy": "ddp"} | timings.detail()
    detail |= {"backbone_dtype": backbone_dtype(setting), "adapter": "float32"}
    del detail["peak_bytes"]  # this process's: the models are in others
    ratio, goal = timings.ratio("one", "two"), ">= 1.8" if setting.cuda else None
    yield Result("devices", case, "rows a second / one device's", **ratio, goal=goal, detail=detail)


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
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
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

    def train(self) -> None:
        """Train a stage."""
        for process in self.processes:
            stdin = cast(IO[str], process.stdin)
            stdin.write("train\n")
            stdin.flush()
        if not all(cast(IO[str], process.stdout).readline() for process in self.processes):
            raise RuntimeError("a process of the benchmark has ended; its error is above")

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def wait_and_train(device: str, shape: str, number: int, rows: int, steps: int, seed: int) -> None:
    """Make the run ready, then train a stage for every line of standard input, saying when it is done."""
    setting, out = Setting(torch.device(device), seed=seed), sys.stdout
    module = ContinualModule(ShapedLM(shape, seed, backbone_dtype(setting)), queryable())
    lengths = [TEXT_LENGTHS[index % len(TEXT_LENGTHS)] for index in range(number * rows * steps)]
    data = {"batch_size": number * rows, "max_tokens": 512}
    trainer: dict[str, Any] = {"devices": number, "strategy": "ddp"} if number > 1 else {"devices": 1}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):
        stages = sequence(setting, Path(folder) / "run", module, [RandomText(lengths, seed=seed)], data, trainer)
        for _ in sys.stdin:
            stages._fit(1)
            if setting.cuda:
                torch.cuda.synchronize()
            print("trained", file=out, flush=True)


if __name__ == "__main__":
    quieten()
    torch.set_num_threads(1)
    wait_and_train(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
