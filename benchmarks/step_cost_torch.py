# SPDX-License-Identifier: Apache-2.0
"""The same networks in PyTorch, with pytorch_optimizer's AdaHessian, on CPU."""

from collections.abc import Callable
from typing import Any

import torch
from pytorch_optimizer import AdaHessian
from step_cost_contenders import INTERVAL, LEARNING_RATE
from step_cost_timing import Contender, Program
from torch import nn
from torch.nn import functional

BATCHES = {"MLP": 128, "GPT": 8, "ResNet-8": 32, "ResNet-20": 32}


class Attention(nn.Module):
    """Causal self-attention, written out: fused kernels have no second derivative."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        """Make the projections and the mask."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix the positions."""
        b, t, width = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        weights = scores.masked_fill(~self.mask, -1e9).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, width))


class Block(nn.Module):
    """A block of a transformer."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        """Make the layers."""
        super().__init__()
        self.attention = Attention(width, heads, length)
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply attention and the dense layers."""
        x = x + self.attention(self.norm1(x))
        hidden = functional.gelu(self.up(self.norm2(x)), approximate="tanh")
        return x + self.down(hidden)


class GPT(nn.Module):
    """A decoder-only transformer with learned positions."""

    def __init__(
        self, layers: int = 2, width: int = 128, length: int = 128, vocabulary: int = 65
    ) -> None:
        """Make the layers."""
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) / 10)
        self.blocks = nn.Sequential(*[Block(width, 4, length) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = self.embedding(tokens) + self.positions
        return self.head(self.norm(self.blocks(x)))


class Residual(nn.Module):
    """A block of a ResNet."""

    def __init__(self, m: int, n: int, stride: int) -> None:
        """Make the convolutions."""
        super().__init__()
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
    layers: list[nn.Module] = [convolution(3, 16, 3), nn.ReLU()]
    m = 16
    for n in (16, 32, 64):
        for _ in range(blocks_per_stage):
            layers.append(Residual(m, n, 2 if m != n else 1))
            m = n
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, *pool)


def mlp() -> nn.Module:
    """Return a ReLU network of dense layers."""
    first, second = nn.Linear(784, 512), nn.Linear(512, 512)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(512, 10))


def contenders(network: str) -> list[Contender]:
    """Return Adam, the baseline, and AdaHessian on one of the networks."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    n = BATCHES[network]
    makers: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
        "MLP": (mlp, torch.randn(n, 784), torch.randint(10, (n,))),
        "GPT": (GPT, torch.randint(65, (n, 128)), torch.randint(65, (n, 128))),
        "ResNet-8": (
            lambda: resnet(1),
            torch.randn(n, 3, 32, 32),
            torch.randint(10, (n,)),
        ),
        "ResNet-20": (
            lambda: resnet(3),
            torch.randn(n, 3, 32, 32),
            torch.randint(10, (n,)),
        ),
    }
    make, x, y = makers[network]

    def contender(name: str, interval: int | None) -> Contender:
        model = make()
        if interval is None:
            optimizer: Any = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        else:
            optimizer = AdaHessian(
                model.parameters(), lr=LEARNING_RATE, update_period=interval
            )

        def step(count: int) -> int:
            optimizer.zero_grad()
            logits = model(x)
            loss = functional.cross_entropy(logits.flatten(0, -2), y.flatten())
            due = interval is not None and count % interval == 0
            loss.backward(create_graph=due)
            optimizer.step()
            return count + 1

        cycle = 1 if interval is None else interval
        return Contender(name, [Program(step, cycle=cycle)], 0, lambda count: count)

    return [
        contender("torch.optim.Adam", None),
        contender("pytorch_optimizer", 1),
        contender("pytorch_optimizer, every 10", INTERVAL),
    ]
