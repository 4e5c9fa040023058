# SPDX-License-Identifier: Apache-2.0
"""The same networks in PyTorch, with pytorch_optimizer's AdaHessian, on CPU."""

from functools import partial
from typing import Any

import torch
from pytorch_optimizer import AdaHessian
from torch import nn
from torch.nn import functional

from benchmarks.cost.contenders import LEARNING_RATE
from benchmarks.cost.timing import Contender, Program


class GPT(nn.Module):
    """A decoder-only transformer with learned positions."""

    def __init__(self, width: int = 128, length: int = 128, n_tokens: int = 65) -> None:
        """Make the layers."""
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, width)
        self.positions = nn.Parameter(torch.randn(length, width) / 10)
        block = nn.TransformerEncoderLayer(
            *(width, 4, 4 * width),
            dropout=0.0,
            activation=partial(functional.gelu, approximate="tanh"),
            batch_first=True,
            norm_first=True,
            bias=False,
        )
        norm = nn.LayerNorm(width, bias=False)
        self.blocks = nn.TransformerEncoder(block, 2, norm, enable_nested_tensor=False)
        self.head = nn.Linear(width, n_tokens, bias=False)
        self.mask = nn.Transformer.generate_square_subsequent_mask(length)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = self.embedding(tokens) + self.positions
        # Fused attention has no second derivative.
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return self.head(self.blocks(x, self.mask))


class Residual(nn.Module):
    """A block of a ResNet."""

    def __init__(self, m: int, n: int) -> None:
        """Make the convolutions, strided where the width grows."""
        super().__init__()
        stride = 2 if m != n else 1
        self.a = convolution(m, n, 3, stride)
        self.b = convolution(n, n, 3)
        self.skip = convolution(m, n, 1, stride) if m != n else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add two convolutions to the input."""
        return functional.relu(self.b(functional.relu(self.a(x))) + self.skip(x))


def convolution(m: int, n: int, size: int, stride: int = 1) -> nn.Module:
    """Return a convolution with batch normalisation."""
    conv = nn.Conv2d(m, n, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n))


def resnet(blocks_per_stage: int) -> nn.Module:
    """Return a CIFAR ResNet of 6n + 2 layers."""
    widths = [n for n in (16, 32, 64) for _ in range(blocks_per_stage)]
    blocks = map(Residual, [16, *widths], widths)
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(convolution(3, 16, 3), nn.ReLU(), *blocks, *end)


def mlp() -> nn.Module:
    """Return a ReLU network of dense layers."""
    first, second = nn.Linear(784, 512), nn.Linear(512, 512)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(512, 10))


def contenders(network: str) -> list[Contender]:
    """Return Adam, the baseline, and AdaHessian on one of the networks."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    make, x, y = {
        "MLP": (mlp, torch.randn(128, 784), torch.randint(10, (128,))),
        "GPT": (GPT, torch.randint(65, (8, 128)), torch.randint(65, (8, 128))),
        "ResNet-8": (partial(resnet, 1), *images),
        "ResNet-20": (partial(resnet, 3), *images),
    }[network]

    def contender(name: str, interval: int | None) -> Contender:
        model = make()
        optimizer: Any = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        if interval is not None:
            optimizer = AdaHessian(
                model.parameters(), LEARNING_RATE, update_period=interval
            )

        def step(count: int) -> int:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
            due = interval is not None and count % interval == 0
            loss.backward(create_graph=due)
            optimizer.step()
            return count + 1

        return Contender(name, [Program(step, cycle=interval or 1)], 0)

    return [
        contender("torch.optim.Adam", None),
        contender("pytorch_optimizer", 1),
        contender("pytorch_optimizer, every 10", 10),
    ]
