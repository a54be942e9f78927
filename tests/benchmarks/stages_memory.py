"""A run of the growing bank, in a process of its own: what it keeps in memory after each stage, as a line of JSON.

python tests/benchmarks/stages_memory.py DEVICE SHAPE STAGES ROWS SEED
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measuring import Setting
from subjects import RandomText, ShapedLM, backbone_dtype, queryable, sequence
from torch import Tensor

from continual.adapters.growing.bank import SlicedBank as Bank
from continual.runtime.quiet import quieten
from continual.strategies import GrowingBank
from continual.strategies.bank_parts import bank_of
from continual.training.module import ContinualModule


def read(module: ContinualModule) -> dict[str, int]:
    """Return what is held between two stages.

    Resident bytes of the process; bytes of all tensors that Python knows of, each storage once; bytes allocated on the
    GPU; bytes of the bank.
    """
    gc.collect()
    found = {"resident": resident_bytes(), "tensors": tensor_bytes(), "bank": bank_bytes(bank_of(module))}
    return found | ({"gpu": torch.cuda.memory_allocated(module.device)} if module.device.type == "cuda" else {})


def resident_bytes() -> int:
    """Return the resident memory of this process; on Linux alone."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def tensor_bytes() -> int:
    """Return the bytes of all tensors that Python knows of, each storage once."""
    storages = [item.untyped_storage() for item in gc.get_objects() if isinstance(item, Tensor) and not item.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def bank_bytes(bank: Bank) -> int:
    """Return what a bank is in memory: slices, the parts that they are kept as, and the gate."""
    tensors: list[Tensor] = []
    for name in bank.names:
        tensors += [*bank.tuner.queryable_bank[name].state_dict().values(), *bank.matrices(name).values()]
        tensors += [part for parts in bank.factored.get(name, {}).values() for part in parts.tensors().values()]
    return sum(tensor.nbytes for tensor in tensors) + 4 * bank.gate.num_numbers


def main(device: str, shape: str, stages: int, rows: int, seed: int) -> list[dict[str, int]]:
    """Run the stages and return what was read after each, the untrained model's first."""
    setting = Setting(torch.device(device), seed=seed)
    strategy = GrowingBank(instruction_encoder="backbone", background_rows=64, reuse="none")
    module = ContinualModule(ShapedLM(shape, seed, backbone_dtype(setting)), queryable(), strategy=strategy)
    tasks: list[Any] = []
    for index in range(stages):
        labels = [f"{chr(97 + index)}{side}" for side in "lr"]
        tasks.append(RandomText([20 + 4 * (row % 8) for row in range(rows)], labels, seed=seed + index))
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):
        run = sequence(setting, Path(folder) / "run", module, tasks, {"batch_size": 8})
        write, found = run._write, list[dict[str, int]]()

        def write_and_read(index: int, tables: dict[str, Any]) -> None:
            write(index, tables)
            found.append(read(module))

        with patch.object(run, "_write", write_and_read):
            run.run()
    return found


if __name__ == "__main__":
    quieten()
    print(json.dumps(main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))))
