"""The typed configuration of a run. Unknown keys are errors; every key has a default that works.

Sizes accept bytes or a string such as ``"512MiB"``. ``auto`` lets the strategy decide from the problem's features.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AttackConfig(Section):
    """Search for counterexamples."""

    enabled: bool = True
    restarts: int = Field(default=100, ge=1, description="random starting points per round")
    steps: int = Field(default=60, ge=1, description="gradient steps per restart")
    time_fraction: float = Field(default=0.1, ge=0, le=1, description="share of the time limit for the first attack")


class AlphaConfig(Section):
    """Slope optimisation (alpha-CROWN)."""

    iterations: int = Field(default=40, ge=0, description="optimiser steps for the final rows at the root")
    intermediate_iterations: int | Literal["auto"] = Field(default="auto", description="steps for every hidden node")
    learning_rate: float = Field(default=0.25, gt=0)
    decay: float = Field(default=0.97, gt=0, le=1, description="factor on the learning rate after every step")
    share: Literal["auto", "none", "channel", "node"] = Field(default="auto", description="sharing of slopes over rows")


class BoundsConfig(Section):
    """Bound propagation at the root."""

    method: Literal["auto", "ibp", "crown", "alpha-crown"] = "auto"
    alpha: AlphaConfig = AlphaConfig()


class BabConfig(Section):
    """Branch and bound."""

    enabled: bool = True
    branching: Literal["auto", "babsr", "kfsb", "input"] = "auto"
    input_split: Literal["smart", "longest"] = "smart"
    batch_size: int | Literal["auto"] = "auto"
    iterations: int = Field(default=20, ge=0, description="optimiser steps per batch of domains")
    learning_rate_alpha: float = Field(default=0.1, gt=0)
    learning_rate_beta: float = Field(default=0.05, gt=0)
    candidates: int = Field(default=3, ge=1, description="k of kFSB: candidate splits tried per domain")
    max_domains: int | None = Field(default=None, description="stop with unknown after this many bounded domains")
    leaf_lp: bool = Field(default=True, description="solve an LP where every neuron is decided")
    clip: bool = Field(default=True, description="cut input boxes by the final linear bounds (input splits)")


class ParallelConfig(Section):
    """Where weights and work live."""

    backend: Literal["single"] = "single"


class MemoryConfig(Section):
    """Budgets; they decide chunk and batch sizes."""

    device_limit: int | str | None = Field(default=None, description="bytes the device may use, e.g. 8GiB")
    chunk_bytes: int | str = Field(default="256MiB", description="bytes of coefficients alive in one chunk of rows")


class NumericsConfig(Section):
    """What a proof rests on."""

    certify: bool = Field(default=True, description="re-evaluate proofs in float64 with every rounding charged")


class Config(Section):
    """All settings of a run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    threads: int | Literal["auto"] = "auto"
    attack: AttackConfig = AttackConfig()
    bounds: BoundsConfig = BoundsConfig()
    bab: BabConfig = BabConfig()
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig = MemoryConfig()
    numerics: NumericsConfig = NumericsConfig()
