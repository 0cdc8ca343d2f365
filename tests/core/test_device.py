"""The one table of what is known of devices."""

from __future__ import annotations

import torch

from verifier.core.device import CPU, CUDA, facts


def test_a_device_is_found_by_its_kind() -> None:
    assert facts(torch.device("cpu")) is facts("cpu") is CPU
    assert facts(torch.device("cuda", 3)) is facts("cuda") is CUDA


def test_a_gpu_does_more_at_once() -> None:
    smaller = {"probes"}
    for name, of_cpu in vars(CPU).items():
        of_gpu = vars(CUDA)[name]
        if isinstance(of_cpu, bool) or of_gpu is None:
            continue
        assert (of_gpu <= of_cpu) if name in smaller else (of_gpu > of_cpu >= 0), name
