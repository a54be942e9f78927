"""How a row is put into words: the instruction that its prompt and its gate get, and the list of options in between.

A prompt opens with the instruction and, for a label task whose options are listed, one line of its labels; neither is
ever cut. A gate, such as the router's instruction prior, gets an instruction of its own, which is the prompt's unless
a wording says otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tasks import Task

Where = Literal["prompt", "gate", "both"]
Options = Literal["kept", "dropped", "shuffled"]


@dataclass(frozen=True)
class Wording:
    """One way to put the rows of a task into words; by default the one that tasks are trained in.

    Attributes:
        name: What tables call it.
        instruction: The instruction to give; None for the task's own, "" for none.
        where: Who gets that instruction: the prompt, the gate, or both. The other one gets the task's own.
        options: What becomes of the list of options, where prompts have one.
        seed: Decides the order of shuffled options, which is another one for each row.
    """

    name: str = "training"
    instruction: str | None = None
    where: Where = "both"
    options: Options = "kept"
    seed: int = 0

    def in_prompt(self, own: str) -> str:
        """Return the instruction in the prompt of a task whose own instruction is ``own``."""
        return own if self.instruction is None or self.where == "gate" else self.instruction

    def at_gate(self, own: str) -> str:
        """Return the instruction that a gate gets."""
        return own if self.instruction is None or self.where == "prompt" else self.instruction

    def order(self, labels: Sequence[str], row: int) -> list[str]:
        """Return the labels as row number ``row`` lists them: as they are, none, or in any order but their own."""
        if self.options == "dropped":
            return []
        order = list(labels)
        if self.options == "shuffled" and len(set(order)) > 1:
            rng = random.Random(f"{self.seed}/{row}")  # from text, so that neighbouring seeds are unrelated
            while order == list(labels):
                rng.shuffle(order)
        return order


TRAINING = Wording()


def opening(instruction: str, options: Sequence[str]) -> str:
    """Return what a prompt opens with: the instruction and the line of options, each where there is one."""
    line = f"Options: {', '.join(options)}" if options else ""
    return "\n".join(part for part in (instruction, line) if part)


def varied(task: Task, listed: bool, num_rows: int, share: float, seed: int) -> list[Wording]:
    """Return a wording for each of ``num_rows`` training rows, a share of which is put differently.

    Options shuffled, options dropped and the instruction left out get equal shares; what does not apply to the task
    (no list, a single label, no instruction) gets none. The draw depends on the arguments alone.
    """
    labels = (task.labels or []) if listed else []
    kinds = [Wording("options shuffled", options="shuffled", seed=seed)] if len(labels) > 1 else []
    kinds += [Wording("options dropped", options="dropped")] if labels else []
    kinds += [Wording("no instruction", "")] if task.instruction and task.kind != "regression" else []
    wordings = [TRAINING] * num_rows
    if kinds:
        for place, row in enumerate(random.Random(f"vary {seed}").sample(range(num_rows), round(share * num_rows))):
            wordings[row] = kinds[place % len(kinds)]
    return wordings
