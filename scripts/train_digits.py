"""Draws digits, trains a small convolutional network on them, and writes what ``verifier certify`` takes.

    python scripts/train_digits.py --out results/digits [--count 100]
    verifier certify results/digits/digits.onnx results/digits/digits.npz --eps 0.01,0.02,0.04,0.08 --clip 0 1

The digits are 5x7 letters of a font, shifted, brightened and noisy, in pictures of 14x14. Same seed, same torch, same
files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scripts.train_examples import save_onnx, train

# Rows of five dots, from the top; a hexadecimal number each.
_FONT = {
    0: "0e 11 13 15 19 11 0e",
    1: "04 0c 04 04 04 04 0e",
    2: "0e 11 01 02 04 08 1f",
    3: "1f 02 04 02 01 11 0e",
    4: "02 06 0a 12 1f 02 02",
    5: "1f 10 1e 01 01 11 0e",
    6: "06 08 10 1e 11 11 0e",
    7: "1f 01 02 04 08 08 08",
    8: "0e 11 11 0e 11 11 0e",
    9: "0e 11 11 0f 01 02 0c",
}
SIZE = 14


def letter(digit: int) -> Tensor:
    """(7, 5), zeros and ones."""
    return torch.tensor([[(int(row, 16) >> k) & 1 for k in range(4, -1, -1)] for row in _FONT[digit].split()]).float()


def digits_data(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (count, 1, 14, 14) in [0, 1] and labels."""
    label = torch.randint(10, (count,), generator=generator)
    image = 0.25 * torch.rand((count, 1, SIZE, SIZE), generator=generator)
    for i in range(count):
        big = letter(int(label[i])).repeat_interleave(2, 0).repeat_interleave(2, 1)[:12, :10]
        top, left = (int(torch.randint(n, (1,), generator=generator)) for n in (SIZE - 12 + 1, SIZE - 10 + 1))
        brightness = 0.5 + 0.25 * torch.rand((), generator=generator)
        image[i, 0, top : top + 12, left : left + 10] += brightness * big
    return image.clamp(0, 1), label


def digits_network() -> nn.Sequential:
    """About 17,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def make_digits(out: Path, steps: int, count: int) -> float:
    """Write ``digits.onnx`` and ``digits.npz`` (unseen pictures); the accuracy on what it was trained on."""
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(3)
    network = digits_network()
    accuracy = train(network, *digits_data(3000, generator), steps, generator, radius=0.03)
    out.mkdir(parents=True, exist_ok=True)
    save_onnx(network.eval(), (1, SIZE, SIZE), out / "digits.onnx")
    image, label = digits_data(count, generator)
    np.savez(out / "digits.npz", inputs=image.numpy(), labels=label.numpy())
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a network on drawn digits.")
    parser.add_argument("--out", type=Path, default=Path("results/digits"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--count", type=int, default=100, help="pictures to write")
    args = parser.parse_args()
    accuracy = make_digits(args.out, args.steps, args.count)
    print(f"digits: accuracy {accuracy:.3f}; {args.out / 'digits.onnx'}, {args.out / 'digits.npz'}")


if __name__ == "__main__":
    main()
