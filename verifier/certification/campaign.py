"""``certify`` and ``certified_radius``: a batch of bounds settles most inputs, the full verifier what is left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verifier.api import load_any
from verifier.bounding import sample_shape
from verifier.certification.answers import Answer, Certification, Radius, Status
from verifier.certification.journal import Journal
from verifier.certification.questions import Questions
from verifier.config import Config, as_config
from verifier.core.deadline import Deadline
from verifier.core.errors import DeadlineExceeded, InputError
from verifier.core.result import Verdict, Witness

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import nn

    from verifier.frontend.network import Network

# Pairs of input and radius between two looks at the clock and two lines of progress.
_QUICK_PAIRS = 256
_STATUS = {Verdict.UNSAT: Status.CERTIFIED, Verdict.SAT: Status.FALSIFIED}


@dataclass(frozen=True)
class CertifyProgress:
    """How far it is.

    Attributes:
        step: ``bounds``, ``attack`` or ``verify``.
        done, total: pairs of input and radius.
        elapsed: seconds; ``eta``: seconds that are left at this rate, None before anything can be said.
    """

    step: str
    done: int
    total: int
    certified: int
    falsified: int
    unknown: int
    elapsed: float
    eta: float | None


Listener = Callable[[CertifyProgress], None]


def certify(
    network: str | Path | nn.Module | Network,
    inputs: ArrayLike,
    labels: ArrayLike | None,
    epsilons: float | Sequence[float],
    norm: str = "linf",
    *,
    clip: tuple[float, float] | None = None,
    timeout: float | None = 60.0,
    total_timeout: float | None = None,
    config: Config | Mapping[str, Any] | str | Path | None = None,
    input_shape: Sequence[int] | None = None,
    resume: str | Path | None = None,
    progress: Listener | None = None,
) -> Certification:
    """Which inputs keep their label within which radii: certified, falsified or unknown.

    The answers are those of :func:`verifier.verify`: CROWN bounds of whole batches certify what they can, and every
    input and radius that is left is given to the verifier. What is certified at a radius is at all smaller ones, what
    is falsified at one is at all larger ones, so that only few are asked.

    Args:
        network: an ONNX file, a torch module or a loaded network; its largest output is the class.
        inputs: (N, *shape of one sample without its leading dimension).
        labels: (N,); None: what the network says itself.
        epsilons: radii, in any order.
        norm: of the radii; ``linf`` alone.
        clip: range of valid inputs, with which every ball is intersected.
        timeout: seconds for each input and radius that the verifier is asked for; None: no limit.
        total_timeout: seconds for all; what was not reached then is unknown.
        config: settings, as for :func:`verifier.verify`.
        input_shape: of one sample of a torch module, its leading dimension included.
        resume: a file that keeps what is answered, and from which a run that was ended goes on.
        progress: told how far it is.

    Raises:
        InputError: inputs, labels or radii are malformed, or do not fit the network.
        UnsupportedError: the network uses something that is not handled.
    """
    if norm.lower() not in ("linf", "inf"):
        raise InputError(f"norm is '{norm}'; radii are measured in linf, the largest change of any input")
    radii = tuple(sorted({float(e) for e in np.atleast_1d(np.asarray(epsilons, dtype=np.float64))}))
    if not radii or not all(math.isfinite(e) and e >= 0 for e in radii):
        raise InputError("epsilons: give at least one radius, each a finite number of at least 0")
    began = time.monotonic()
    asked, shape = _questions(network, inputs, labels, clip, config, input_shape)
    run = _Run(asked, radii, Deadline(total_timeout), timeout, Journal(resume, asked.fingerprints()), progress, began)
    run.begin()
    run.by_bounds()
    run.by_attack()
    run.by_verify()
    correct = run.correct
    answers = [[_shaped(a, shape) for a in row] for row in run.answers()]
    return Certification(radii, asked.labels, correct, answers, "linf", time.monotonic() - began)


def _questions(
    network: str | Path | nn.Module | Network,
    inputs: ArrayLike,
    labels: ArrayLike | None,
    clip: tuple[float, float] | None,
    config: Config | Mapping[str, Any] | str | Path | None,
    input_shape: Sequence[int] | None,
) -> tuple[Questions, tuple[int, ...]]:
    """The questions, and the shape of one input."""
    x = np.asarray(inputs)
    if x.ndim < 2 or not x.shape[0]:
        raise InputError(f"inputs have shape {list(x.shape)}; give at least one, the first dimension counts them")
    if x.dtype.kind not in "fiu":
        raise InputError(f"inputs are of type {x.dtype}; give numbers, scaled as the network takes them")
    settings = as_config(config)
    loaded = load_any(network, tuple(input_shape) if input_shape else sample_shape(x.shape))
    flat = x.reshape(len(x), -1).astype(np.float64)
    if not np.isfinite(flat).all():
        raise InputError("an input has a value that is not finite")
    if labels is None:
        asked = Questions(loaded, flat, np.zeros(len(x), dtype=np.int64), clip, settings)
        asked = replace(asked, labels=asked.predictions())
    else:
        given = np.asarray(labels)
        if given.dtype.kind not in "iu" and not (given == given.round()).all():
            raise InputError("labels are not whole numbers; give the index of each input's class")
        asked = Questions(loaded, flat, given.reshape(-1).astype(np.int64), clip, settings)
    return asked, x.shape[1:]


def _shaped(found: Answer, shape: tuple[int, ...]) -> Answer:
    return found if found.adversarial is None else replace(found, adversarial=found.adversarial.reshape(shape))


@dataclass
class _Run:
    """One certification on its way.

    Attributes:
        least: by input, how many of its radii are certified, the smallest ones; ``most``: how many are not falsified.
    """

    asked: Questions
    radii: tuple[float, ...]
    deadline: Deadline
    timeout: float | None
    journal: Journal
    listener: Listener | None
    began: float
    known: dict[tuple[int, int], Answer] = field(default_factory=dict)

    def begin(self) -> None:
        """What earlier runs know, and inputs that are misclassified themselves."""
        n, e = len(self.asked.inputs), len(self.radii)
        self.correct = self.asked.predictions() == self.asked.labels
        self.least, self.most = np.zeros(n, dtype=int), np.full(n, e)
        places = {epsilon: place for place, epsilon in enumerate(self.radii)}
        for found in self.journal.read():
            if found.epsilon in places and self._stands(found):
                self._note(replace(found, by="earlier", seconds=0.0), places[found.epsilon])
        fresh = []
        for index in np.flatnonzero(~self.correct & (self.most > self.least)):
            witness = self.asked.replayed(int(index), self.radii[0], self.asked.inputs[index])
            if witness is not None:
                fresh.append(self._falsified(int(index), 0, "input", witness))
        self.journal.add(fresh)

    def _stands(self, found: Answer) -> bool:
        """An adversarial example that was read from a file counts if it still is one."""
        if found.status is not Status.FALSIFIED:
            return True
        return found.adversarial is not None and (
            self.asked.replayed(found.index, found.epsilon, found.adversarial.reshape(-1)) is not None
        )

    def _falsified(self, index: int, place: int, by: str, witness: Witness, seconds: float = 0.0) -> Answer:
        found = Answer(index, self.radii[place], Status.FALSIFIED, by, "", seconds, witness.inputs)
        self._note(found, place)
        return found

    def _note(self, found: Answer, place: int) -> None:
        self.known[found.index, place] = found
        if found.status is Status.CERTIFIED:
            self.least[found.index] = max(self.least[found.index], place + 1)
        elif found.status is Status.FALSIFIED:
            self.most[found.index] = min(self.most[found.index], place)

    def by_bounds(self) -> None:
        """The largest radius that batched bounds certify, by bisection of all inputs at once."""
        low, high = self.least.copy(), self.most.copy()
        while self.asked.quick_counts and (low < high).any():
            open_ = np.flatnonzero(low < high)
            for start in range(0, len(open_), _QUICK_PAIRS):
                some = open_[start : start + _QUICK_PAIRS]
                places = (low[some] + high[some]) // 2
                began = time.monotonic()
                try:
                    sure = self.asked.quick(
                        [(int(i), self.radii[p]) for i, p in zip(some, places, strict=True)], self.deadline
                    )
                except DeadlineExceeded:
                    return
                each = (time.monotonic() - began) / len(some)
                low[some[sure]], high[some[~sure]] = places[sure] + 1, places[~sure]
                fresh = []
                for index, place in zip(some[sure], places[sure], strict=True):
                    found = Answer(int(index), self.radii[place], Status.CERTIFIED, "bounds", "", each)
                    self._note(found, int(place))
                    fresh.append(found)
                self.journal.add(fresh)
                self._tell("bounds", None)

    def by_attack(self) -> None:
        """The smallest radius at which a short attack on all inputs succeeds, by bisection as well."""
        if not self.asked.config.attack.enabled:
            return
        low, high = self.least.copy(), self.most.copy()
        while (low < high).any():
            open_ = np.flatnonzero(low < high)
            for start in range(0, len(open_), _QUICK_PAIRS):
                some = open_[start : start + _QUICK_PAIRS]
                places = (low[some] + high[some]) // 2
                began = time.monotonic()
                pairs = [(int(i), self.radii[p]) for i, p in zip(some, places, strict=True)]
                try:
                    witnesses = self.asked.attack(pairs, self.deadline)
                except DeadlineExceeded:
                    return
                each, fresh = (time.monotonic() - began) / len(some), []
                for index, place, witness in zip(some, places, witnesses, strict=True):
                    if witness is None:
                        low[index] = place + 1
                    else:
                        high[index] = place
                        fresh.append(self._falsified(int(index), int(place), "attack", witness, each))
                self.journal.add(fresh)
                self._tell("attack", None)

    def by_verify(self) -> None:
        """What is left, one by one, the middle one of an input's open radii first."""
        began, done = time.monotonic(), 0
        for index in range(len(self.labels)):
            while (open_ := self._open(index)) and not self.deadline.expired():
                place = open_[len(open_) // 2]
                self._verify(index, place)
                done += 1
                left = sum(math.ceil(math.log2(1 + len(self._open(i)))) for i in range(index, len(self.labels)))
                self._tell("verify", (time.monotonic() - began) / done * left)

    @property
    def labels(self) -> np.ndarray:
        return self.asked.labels

    def _open(self, index: int) -> list[int]:
        """Radii of an input that are neither decided nor were asked in vain."""
        return [p for p in range(self.least[index], self.most[index]) if (index, p) not in self.known]

    def _verify(self, index: int, place: int) -> None:
        began = time.monotonic()
        limits = [t for t in (self.timeout, self.deadline.remaining()) if t is not None and math.isfinite(t)]
        try:
            result = self.asked.ask(index, self.radii[place], max(min(limits), 1e-3) if limits else None)
        except DeadlineExceeded as error:
            found = Answer(index, self.radii[place], Status.UNKNOWN, "verify", str(error), time.monotonic() - began)
        else:
            status = _STATUS.get(result.verdict, Status.UNKNOWN)
            reason = result.reason if status is Status.UNKNOWN else ""
            adversarial = None if result.witness is None else result.witness.inputs
            seconds = time.monotonic() - began
            found = Answer(index, self.radii[place], status, "verify", reason, seconds, adversarial)
        self._note(found, place)
        self.journal.add([found])

    def answers(self) -> Iterator[list[Answer]]:
        """All of them, with what follows from others."""
        for index in range(len(self.labels)):
            row = []
            for place, epsilon in enumerate(self.radii):
                found = self.known.get((index, place))
                if place < self.least[index] and (found is None or found.status is Status.UNKNOWN):
                    found = Answer(index, epsilon, Status.CERTIFIED, "implied")
                elif place >= self.most[index] and (found is None or found.status is Status.UNKNOWN):
                    nearest = self.known[index, int(self.most[index])]
                    found = replace(nearest, epsilon=epsilon, by="implied", seconds=0.0)
                row.append(
                    found or Answer(index, epsilon, Status.UNKNOWN, "verify", "the time for all was over before")
                )
            yield row

    def _tell(self, step: str, eta: float | None) -> None:
        if self.listener is None:
            return
        n, e = len(self.labels), len(self.radii)
        certified, falsified = int(self.least.sum()), int((e - self.most).sum())
        vain = [(i, p) for (i, p), a in self.known.items() if a.status is Status.UNKNOWN]
        unknown = sum(self.least[i] <= p < self.most[i] for i, p in vain)
        done = certified + falsified + unknown
        elapsed = time.monotonic() - self.began
        self.listener(CertifyProgress(step, done, n * e, certified, falsified, int(unknown), elapsed, eta))


# -- radii -------------------------------------------------------------------------------------------------------


def certified_radius(
    network: str | Path | nn.Module | Network,
    inputs: ArrayLike,
    labels: ArrayLike | None,
    largest: float,
    tolerance: float | None = None,
    *,
    clip: tuple[float, float] | None = None,
    timeout: float | None = 60.0,
    config: Config | Mapping[str, Any] | str | Path | None = None,
    input_shape: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Radius]:
    """The largest linf radius at which every input is certified, by bisection.

    Batches of bounds find where each input's search begins, and every adversarial example, at its own distance, where
    it ends; in between the verifier is asked.

    Args:
        network, inputs, labels, clip, config, input_shape: as for :func:`certify`.
        largest: radius that is looked at.
        tolerance: the bisection ends when certified and falsified radius are so near; default a hundredth of the
            largest.
        timeout: seconds for each question; a radius that is not decided in it counts as not certified.
        progress: told how many of all inputs are done.
    """
    step = largest / 100 if tolerance is None else tolerance
    if not (math.isfinite(largest) and largest > 0 and step > 0):
        raise InputError("the largest radius and the tolerance have to be positive numbers")
    asked, shape = _questions(network, inputs, labels, clip, config, input_shape)
    count = len(asked.inputs)
    right = asked.predictions() == asked.labels
    low = _by_bounds(asked, np.where(right, largest, 0.0), step)
    out = []
    for index in range(count):
        found = _bisect(asked, index, float(low[index]), largest, step, timeout, bool(right[index]))
        adversarial = None if found.adversarial is None else found.adversarial.reshape(shape)
        out.append(replace(found, adversarial=adversarial))
        if progress is not None:
            progress(index + 1, count)
    return out


def _by_bounds(asked: Questions, largest: np.ndarray, step: float) -> np.ndarray:
    """(N,) radii that batched bounds certify; 0.0 where they certify none."""
    low, high, first = np.zeros(len(largest)), largest.copy(), True
    while (open_ := np.flatnonzero(high - low > step)).size and asked.quick_counts:
        middle = high[open_] if first else (low[open_] + high[open_]) / 2
        sure = asked.quick([(int(i), float(m)) for i, m in zip(open_, middle, strict=True)], Deadline())
        low[open_[sure]], high[open_[~sure]] = middle[sure], middle[~sure]
        first = False
    return low


def _bisect(
    asked: Questions, index: int, low: float, largest: float, step: float, timeout: float | None, right: bool
) -> Radius:
    """Between a certified radius and the largest one."""
    began = time.monotonic()
    falsified: float | None = None
    unknown: float | None = None
    adversarial: np.ndarray | None = None
    if not right:
        return Radius(index, 0.0, 0.0, None, 0.0, asked.inputs[index])
    end, first = largest, True
    while end - low > step or (first and low < largest):
        middle = largest if first else (low + end) / 2
        first = False
        result = asked.ask(index, middle, timeout)
        status = _STATUS.get(result.verdict, Status.UNKNOWN)
        if status is Status.CERTIFIED:
            low = middle
        elif status is Status.FALSIFIED and result.witness is not None:
            # Its distance, rounded up, is a radius at which it still counts.
            distance = float(np.nextafter(np.abs(result.witness.inputs - asked.inputs[index]).max(), math.inf))
            falsified, adversarial = min(middle, distance), result.witness.inputs
            end = min(end, falsified)
        else:
            unknown = middle
            end = middle
    if falsified is not None and unknown is not None and unknown >= falsified:
        unknown = None
    return Radius(index, low, falsified, unknown, time.monotonic() - began, adversarial)
