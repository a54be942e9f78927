"""A finished model's prompts reworded: paraphrased, unsaid or wrong instructions.

The file of paraphrases is a JSON object, a task's name to the list of its paraphrases:

    {"boolq": ["Is the answer yes or no according to the passage?", ...], ...}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from continual.data.prompt_variants import Options, Where, Wording
from continual.data.stage_data import StageData
from continual.errors import ConfigError
from continual.interfaces import Rows

Slot = dict[str, Wording]
"""A wording for each task, by the task's name, that are scored together; a task it does not suit is left out."""

Score = Callable[[list[StageData]], tuple[Rows, Rows]]
"""Scores test rows; returns the rows of the tables scores and answers."""


@dataclass
class Rewording:
    """Which reworded prompts to score a finished model under.

    Args:
        file: JSON file of paraphrases, by task name; null for none. Its stem is what tables call them.
        key: A name in the file whose paraphrases are every task's, where all tasks have one instruction.
        options: What becomes of the list of options under each paraphrase: kept, dropped, shuffled. Other lists than
            the trained one exist for label tasks with data.options "listed" only.
        where: Who gets the paraphrase: gate, prompt, both. "gate" is passed over where nothing reads an instruction
            apart from the prompt.
        none: Score with no instruction at all, in neither prompt nor gate.
        wrong: Score with another task's instruction in both: the next stage's that differs.
    """

    file: str | None = None
    key: str | None = None
    options: list[Options] = field(default_factory=lambda: ["kept", "dropped", "shuffled"])
    where: list[Where] = field(default_factory=lambda: ["gate", "both"])
    none: bool = True
    wrong: bool = True

    def slots(self, stages: Sequence[StageData], has_gate: bool) -> list[Slot]:
        """Return the wordings to score ``stages`` in.

        Raises:
            ConfigError: The file cannot be read, a task has no paraphrases, or a task has no words to change.
        """
        for data in stages:
            if data.task.kind == "regression":
                raise ConfigError(f"wordings: the task of stage {data.name!r} is a regression, which has no prompt")
        paraphrases = self._paraphrases(stages) if self.file else {}
        num_each = max(map(len, paraphrases.values()), default=0)
        where: list[Where] = [place for place in self.where if has_gate or place != "gate"]
        found: list[Slot] = []
        for index, place, options in product(range(num_each), where, self.options):
            name = f"{Path(str(self.file)).stem}-{index + 1}"
            found.append(
                {
                    data.name: Wording(name, paraphrases[data.name][index], place, options)
                    for data in stages
                    if index < len(paraphrases[data.name]) and _has_options(data, options)
                }
            )
        if self.none:
            found.append({data.name: Wording("none", "") for data in stages if data.task.instruction})
        if self.wrong:
            found.append({name: Wording("wrong", text) for name, text in _next_instructions(stages).items()})
        return [slot for slot in found if slot]

    def _paraphrases(self, stages: Sequence[StageData]) -> dict[str, list[str]]:
        where = f"wordings.file {self.file}"
        try:
            content = json.loads(Path(str(self.file)).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{where}: an object of task names is expected")
        found = {}
        for data in stages:
            name = self.key or data.name
            texts = content.get(name)
            if texts is None:
                raise ConfigError(f"{where}: no paraphrases for {name!r}; there are those of {', '.join(content)}")
            if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
                raise ConfigError(f"{where}: {name!r} needs a list of texts")
            found[data.name] = texts
        return found


def check_fit(slots: Sequence[Slot], stages: Sequence[StageData]) -> None:
    """Raise ConfigError where a prompt would not fit under reworded prompts, before anything is trained.

    Only the opening of a prompt changes, so that each task is tried under the wording whose opening is longest.
    """
    for data in stages:
        own = [slot[data.name] for slot in slots if data.name in slot]
        if own:
            try:
                data.worded(max(own, key=data.opening_tokens))
            except ConfigError as error:
                raise ConfigError(f"wordings: stages.{data.name}: {error}") from error


def score_slots(slots: Sequence[Slot], stages: Sequence[StageData], score: Score) -> dict[str, Rows]:
    """Score tasks under each slot's wordings and return the rows of the tables wordings and wording_answers.

    Args:
        slots: From ``Rewording.slots``.
        stages: The data of every stage.
        score: Scores them.
    """
    rows: dict[str, Rows] = {"wordings": [], "wording_answers": []}
    for slot in slots:
        scores, answers = score([data.worded(slot[data.name]) for data in stages if data.name in slot])
        first = next(iter(slot.values()))
        keys = {"wording": first.name, "where": first.where, "options": first.options}
        rows["wordings"] += [row | keys for row in scores]
        for answer in answers:
            del answer["prediction"]
            rows["wording_answers"].append(answer | keys)
    return rows


def _has_options(data: StageData, options: Options) -> bool:
    """Say whether a task's options can be treated so; kept they can always be."""
    num_listed = len(data.task.labels or []) if data.options == "listed" else 0
    return options == "kept" or num_listed > (1 if options == "shuffled" else 0)


def _next_instructions(stages: Sequence[StageData]) -> dict[str, str]:
    """Return, for each task, the instruction of the next stage that has another one; the first follows the last."""
    own = [data.task.instruction for data in stages]
    found = {}
    for place, data in enumerate(stages):
        others = [text for text in own[place + 1 :] + own[:place] if text and text != own[place]]
        if others:
            found[data.name] = others[0]
    return found
