"""Judges of free answers: what a generated text earns against a row's own answer, or against all that it may be.

A row's references are what its text is judged against: the accepted answers (ReCoRD names an entity in several ways)
or, for programs, the tests. Where a task names none, its answer is the only one.
"""

from __future__ import annotations

import abc
import re
import string
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from tasks import sandbox
from tasks.base import TaskError


class Judge(abc.ABC):
    """Scores a free answer in [0, 1]."""

    def check(self) -> None:  # noqa: B027  (most judges need nothing)
        """Raise TaskError if answers cannot be judged here; called before anything is trained."""

    def can_judge(self, reference: str) -> bool:
        """Say whether a row with this reference can be judged; a task leaves out the rows that cannot."""
        return bool(reference)

    def constant(self, answer: str) -> str | None:
        """Return an answer that earns what this one does, alike for all that do; None where none earns it twice."""
        return answer

    @abc.abstractmethod
    def score(self, text: str, references: Sequence[str]) -> float:
        """Return what ``text`` earns: the best over ``references`` (a program has to pass them all)."""

    def facts(self) -> dict[str, Any]:
        """Return what a report says of the judge."""
        return {"judge": type(self).__name__}


class ExactMatch(Judge):
    """1 for the same text, letter case and surrounding whitespace aside."""

    def score(self, text: str, references: Sequence[str]) -> float:
        """Return 1.0 or 0.0."""
        return float(text.strip().casefold() in {reference.strip().casefold() for reference in references})


class TokenOverlap(Judge):
    """F1 of the words shared, articles, punctuation and letter case aside; the best over the references.

    Source: SQuAD (Rajpurkar et al. 2016, 1606.05250), as ReCoRD takes it over (Zhang et al. 2018, 1810.12885).
    """

    def score(self, text: str, references: Sequence[str]) -> float:
        """Return the F1, in [0, 1]."""
        return max((_f1(plain_words(text), plain_words(reference)) for reference in references), default=0.0)


class FinalAnswer(Judge):
    """1 where the final answers of two solutions are the same number or, numbers failing, the same formula.

    The final answer is what stands in the last ``\\boxed{}``, else behind the last ``####`` (GSM8K), else behind the
    last "answer is" or "Answer:"; of a generated text that has none of these, its last number. Dollar signs, thousands
    commas, units, "x =", LaTeX spacing and the spellings of a fraction make no difference; 0.5, 1/2 and
    ``\\frac{1}{2}`` are one number. A row whose own solution marks no final answer (a proof) is left out.
    """

    def can_judge(self, reference: str) -> bool:
        """Say whether the solution marks its final answer, or is nothing but a number."""
        return bool(_final(reference))

    def constant(self, answer: str) -> str | None:
        """Return the final answer alone, marked."""
        return f"\\boxed{{{_final(answer)}}}"

    def score(self, text: str, references: Sequence[str]) -> float:
        """Return 1.0 or 0.0."""
        marked = marked_answer(text)
        if marked is None:
            numbers = _NUMBER.findall(text)
            marked = numbers[-1] if numbers else ""
        given = normalised(marked)
        return float(bool(given) and any(_same(given, _final(reference)) for reference in references))


class PassesTests(Judge):
    """pass@1: 1 where a generated program passes all of its row's tests, each a Python statement such as an assert.

    THIS RUNS PROGRAMS THAT A MODEL WROTE, and so is off unless asked for: a task with it is refused before training.
    There is no score in its place, because likeness to the reference program says nothing about passing tests. What
    holds a program back, and what does not, is told by ``tasks.sandbox``; the manifest's ``isolation`` says which of
    its two layers held on the machine of a run.

    Args:
        run_generated_code: Run them.
        seconds: Time that a program and its tests may take together.
        memory_mib: Memory that they may take, in MiB.

    Raises:
        TaskError: For limits that are not positive.
    """

    def __init__(self, run_generated_code: bool = False, seconds: float = 5.0, memory_mib: int = 512) -> None:
        if seconds <= 0 or memory_mib < 1:
            raise TaskError(f"PassesTests needs positive limits, got seconds {seconds} and memory_mib {memory_mib}")
        self.run_generated_code = run_generated_code
        self.limits = sandbox.Limits(seconds, memory_mib)
        self._isolation = ""

    def check(self) -> None:
        """Raise TaskError unless programs may be run, and can be."""
        if not self.run_generated_code:
            raise TaskError(
                "judge PassesTests runs programs that a model wrote, on this machine, and that has not been asked for: "
                "set judge.init_args.run_generated_code=true (tasks/sandbox says what holds them back)"
            )
        try:
            self._isolation = sandbox.isolation(self.limits)
        except sandbox.SandboxError as error:
            raise TaskError(f"judge PassesTests cannot run programs: {error}") from None

    def constant(self, answer: str) -> str | None:
        """Return None: no one program solves two problems."""
        return None

    def score(self, text: str, references: Sequence[str]) -> float:
        """Return 1.0 or 0.0. Of a text with code fences, the first fenced block is the program."""
        if not self.run_generated_code:
            raise TaskError("judge PassesTests may not run generated code")
        return float(sandbox.passes(fenced_code(text), references, self.limits))

    def facts(self) -> dict[str, Any]:
        """Return the judge, its limits and what holds programs back on this machine."""
        limits = {"seconds": self.limits.seconds, "memory_mib": self.limits.memory_mib}
        return super().facts() | limits | {"isolation": self._isolation}


def plain_words(text: str) -> list[str]:
    """Return the words of ``text`` without letter case, punctuation and articles (SQuAD's normalisation)."""
    bare = text.casefold().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def fenced_code(text: str) -> str:
    """Return what stands in the first code fence of ``text``, to its end where it is not closed; else all of it."""
    fence = re.search(r"```[^\n`]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return fence[1] if fence else text


def marked_answer(text: str) -> str | None:
    """Return what a solution marks as its final answer (see ``FinalAnswer``), None where it marks none."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start >= 0:
        return _braced(text[text.index("{", start) :])
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().split("\n")[0]
    told = re.findall(r"answer(?:\s+is|\s*:)\s*:?\s*([^\n]+)", text, re.IGNORECASE)
    return told[-1] if told else None


def normalised(answer: str) -> str:
    """Return a final answer without what makes no difference to it."""
    text = answer.strip().rstrip(".").strip()
    for old, new in ((r"\\[dt]frac", r"\\frac"), (r"\\(left|right|displaystyle)\b|\\[!,;: ]|~", "")):
        text = re.sub(old, new, text)
    text = re.sub(r"(?<=[\d}])\s*\\(?:text|mathrm|textrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$", "", text)  # a unit
    text = re.sub(r"\\(?:text|mathrm|textrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\[()\[\]]|\\?\$|\\?%|\^\{?\\circ\}?|\*\*", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"^[a-zA-Z]\s*=\s*", "", text.strip())
    text = re.sub(r"^(-?[\d./]+)\s+[a-zA-Z][a-zA-Z ]*$", r"\1", text)  # 42 apples
    return re.sub(r"\s+", "", text).rstrip(".")


def _final(solution: str) -> str:
    """Return the final answer of a row's own solution, normalised: the marked one, or the number that is all of it."""
    marked = marked_answer(solution)
    if marked is not None:
        return normalised(marked)
    return normalised(solution) if _value(normalised(solution)) is not None else ""


_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_LONGEST_NUMBER = 100  # characters; a longer one is compared as text


def _value(text: str) -> Fraction | None:
    """Return the number that a normalised answer is: an integer, a decimal or a fraction; None for anything else."""
    fraction = re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}", text)
    plain = f"{fraction[1]}{fraction[2]}/{fraction[3]}".replace("--", "") if fraction else text
    parts = re.fullmatch(r"([-+]?(?:\d+\.?\d*|\.\d+))(?:/(-?\d+))?", plain)
    if parts is None or len(plain) > _LONGEST_NUMBER or (parts[2] is not None and int(parts[2]) == 0):
        return None
    return Fraction(parts[1].rstrip(".")) / int(parts[2] or 1)


def _same(given: str, right: str) -> bool:
    values = _value(given), _value(right)
    return values[0] == values[1] if None not in values else given == right


def _braced(text: str) -> str:
    """Return what the braces that ``text`` opens with hold; to its end where they are not closed."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[1:place]
    return text[1:]


def _f1(given: Sequence[str], right: Sequence[str]) -> float:
    shared = sum((Counter(given) & Counter(right)).values())
    return 2 * shared / (len(given) + len(right)) if shared else float(not given and not right)
