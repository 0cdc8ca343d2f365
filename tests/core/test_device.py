"""The one table of what is known of devices."""

from __future__ import annotations

import torch

from verifier.core.device import CPU, CUDA, chunk_bytes_for, default_chunk_bytes, facts


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


def test_chunks_are_a_sixteenth_of_the_memory_that_a_gpu_is_sold_with() -> None:
    gib = 1 << 30
    assert default_chunk_bytes(torch.device("cpu")) == 256 << 20
    for nominal, reported, chunk in (
        (141, 139.8, 8.0),
        (80, 79.1, 4.0),
        (40, 39.4, 2.0),
        (24, 23.6, 1.0),
        (16, 15.7, 1.0),
        (12, 11.6, 0.5),
        (2, 1.9, 0.25),
    ):
        assert chunk_bytes_for(int(reported * gib)) == chunk * gib == chunk_bytes_for(nominal * gib)
