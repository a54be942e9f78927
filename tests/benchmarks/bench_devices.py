"""A training stage on two devices against one, by Lightning's DDP: rows a second, each device with as many rows a step.

At the text suite's lengths, where a GPU waits for its host, and at 512 tokens a row, where it computes; on GPUs also
recorded, and compiled and recorded, in a stage after the first, which finds what that one has recorded.
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
from bench_training import MODES
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from measuring import Result, Setting, Stand
from subjects import STAGE_ROWS, TEXT_LENGTHS, RandomText, ShapedLM, backbone_dtype, queryable, sequence

from continual.runtime.quiet import quieten
from continual.training.module import ContinualModule


def run(setting: Setting) -> Iterator[Result]:
    """Time both; nothing on a machine with fewer than two GPUs."""
    shape = setting.pick("qwen2.5-0.5b", "smollm2-short", "tiny")
    if setting.cuda and torch.cuda.device_count() < 2:
        return
    rows = setting.pick(16, 4, 2)
    steps = setting.pick(math.ceil(STAGE_ROWS / (2 * rows)), 4, 2)
    for how in ("eager", "graphs", "compiled graphs") if setting.cuda else ("eager",):
        times = 1 if how == "eager" else 3  # fast steps: a stage of few would show what surrounds them
        if setting.wants(case := f"{shape} two devices {how}"):
            yield _two_against_one(setting, case, shape, how, rows, times * steps)
        if setting.cuda and setting.wants(case := f"{shape} two devices 8x512 {how}"):
            yield _two_against_one(setting, case, shape, how, 8, times * 50, tokens=512)


def _two_against_one(
    setting: Setting, case: str, shape: str, how: str, rows: int, steps: int, tokens: int = 0
) -> Result:
    """Time stages of ``steps`` steps on two devices and of twice as many on one, ``rows`` rows a device and step."""
    stand = Stand(setting.device, wall=True)
    with ExitStack() as stack:
        # The same rows in all: two devices make half of the steps.
        counts = [(number, rows, 2 * steps // number, tokens) for number in (1, 2)]
        groups = [stack.enter_context(Group(setting, shape, how, *count)) for count in counts]
        for name, group in zip(("one", "two"), groups, strict=True):
            stand.add(name, lambda group=group: group.train, warm_up=1)
        timings = stand.run(setting.num_rounds(5))
    detail = {"shape": shape, "rows_a_device": rows, "rows": 2 * rows * steps, "tokens_a_row": tokens or TEXT_LENGTHS}
    detail |= {"strategy": "ddp", "mode": how} | timings.detail()
    detail |= {"backbone_dtype": backbone_dtype(setting), "adapter": "float32"}
    del detail["peak_bytes"]  # this process's: the models are in others
    ratio, goal = timings.ratio("one", "two"), ">= 1.8" if setting.cuda else None
    return Result("devices", case, "rows a second / one device's", **ratio, goal=goal, detail=detail)


class Group:
    """The processes of one run, one a device, each waiting to be told to train a stage.

    Args:
        setting: Device and seed.
        shape: The backbone's.
        how: One of bench_training's ``MODES``.
        number: Of devices.
        rows: Rows a device and step.
        steps: Steps a stage.
        tokens: Of each row; 0 for the text suite's lengths.
    """

    def __init__(self, setting: Setting, shape: str, how: str, number: int, rows: int, steps: int, tokens: int) -> None:
        arguments = [setting.device.type, shape, how, number, rows, steps, tokens, setting.seed]
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


def wait_and_train(
    device: str, shape: str, how: str, number: int, rows: int, steps: int, tokens: int, seed: int
) -> None:
    """Make the run ready, then train a stage for every line of standard input, saying when it is done."""
    setting, out = Setting(torch.device(device), seed=seed), sys.stdout
    fast: dict[str, Any] = dict.fromkeys(MODES[how], True)
    module = ContinualModule(ShapedLM(shape, seed, backbone_dtype(setting)), queryable(), **fast)
    usual = (tokens - 3,) if tokens else TEXT_LENGTHS  # an answer is a space, a letter and the end mark
    lengths = [usual[index % len(usual)] for index in range(number * rows * steps)]
    data = {"batch_size": number * rows, "max_tokens": 512}
    trainer: dict[str, Any] = {"devices": number, "strategy": "ddp"} if number > 1 else {"devices": 1}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):
        stages = sequence(setting, Path(folder) / "run", module, [RandomText(lengths, seed=seed)], data, trainer)
        for _ in sys.stdin:
            stages.begin(1, stages.data)
            stages._fit(1)
            if setting.cuda:
                torch.cuda.synchronize()
            print("trained", file=out, flush=True)


if __name__ == "__main__":
    quieten()
    torch.set_num_threads(1)
    wait_and_train(sys.argv[1], sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
