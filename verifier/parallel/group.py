"""A group of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Solo:
    """A group of one rank: nothing travels."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self._called = False

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor[None]

    def all_to_all(self, tensor: Tensor) -> Tensor:
        return tensor

    def numbers(self, values: Sequence[float]) -> list[list[float]]:
        return [list(values)]

    def objects(self, value: Any) -> list[Any]:
        return [value]

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        return value

    def call(self) -> None:
        self._called = True

    def called(self) -> bool:
        return self._called

    def answered(self) -> None:
        self._called = False

    def check(self) -> None:
        """Nobody else can be lost."""
