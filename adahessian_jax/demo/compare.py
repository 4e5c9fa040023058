# SPDX-License-Identifier: Apache-2.0
"""The demo itself: one task, three optimizers, a table and a plot."""

import argparse

import jax
import optax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

import adahessian_jax as ah
from adahessian_jax.demo.curvature import LOSS, make_look
from adahessian_jax.demo.data import load_digits, load_shakespeare, thin
from adahessian_jax.demo.image_files import DataError
from adahessian_jax.demo.models import CharTransformer, ConvNet
from adahessian_jax.demo.report import COLORS, plot, summary, table
from adahessian_jax.demo.training import Run, train, warmup_cosine

SAMPLE = {"digits": 200, "shakespeare": 32}  # examples to see the sharpness on
TASKS = {
    "digits": (load_digits, ConvNet),
    "shakespeare": (load_shakespeare, CharTransformer),
}


def compare(args: argparse.Namespace) -> dict[str, Run]:
    """Train with each optimizer, print a table and save a plot.

    Args:
      args: what :func:`adahessian_jax.demo.cli.parse_args` returns.

    Returns:
      The run of each optimizer, by its name.

    Raises:
      DataError: if data are missing or unusable.
    """
    console = Console(highlight=False)
    load, network = TASKS[args.task]
    data = load(args.data)
    if args.batch_size > len(data.train.labels):
        raise DataError(
            f"--batch-size must be at most {len(data.train.labels)}, the number of"
            f" training examples, got {args.batch_size}."
        )
    model = network(data.n_classes)
    look = make_look(model, thin(data.train, SAMPLE[args.task]))
    device = jax.devices()[0].device_kind
    about = f"{data.source}\n{args.steps} steps of {args.batch_size} on {device}\n"
    console.print(about, markup=False, soft_wrap=True)

    runs = {}
    with Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        bars = {
            name: progress.add_task(
                f"[{COLORS[name]}]{name}", total=args.steps, start=False, status=""
            )
            for name in COLORS
        }
        for name, tx in make_optimizers(args).items():
            bar = bars[name]
            progress.start_task(bar)
            progress.update(bar, status="compiling")

            def show(step: int, loss: float, bar: TaskID = bar) -> None:
                progress.update(bar, completed=step, status=f"loss {loss:.4f}")

            runs[name] = train(
                model,
                tx,
                data,
                steps=args.steps,
                batch_size=args.batch_size,
                seed=args.seed,
                look=look,
                on_step=show,
            )

    console.print(table(runs))
    console.print(summary(runs, n_labels=data.test.labels.size))
    plot(runs, args.plot, title=data.source)
    console.print(f"Plot: {args.plot}", markup=False, soft_wrap=True)
    return runs


def make_optimizers(
    args: argparse.Namespace,
) -> dict[str, optax.GradientTransformation]:
    """Build the optimizers to compare."""
    rate = args.newton_lr  # None is a rate of its own, times a schedule
    schedule = warmup_cosine(1.0 if rate is None else rate, args.steps)
    return {
        "Adam": optax.adamw(
            warmup_cosine(args.adam_lr, args.steps),
            b2=args.adam_b2,
            weight_decay=args.weight_decay,
        ),
        "AdaHessian": ah.adahessian(
            warmup_cosine(args.lr, args.steps),
            b2=args.b2,
            eps=args.eps,
            hessian_power=args.hessian_power,
            hessian_ema=args.hessian_ema,
            estimator=ah.hutchinson(args.n_samples, seed=args.seed),
            update_interval=args.update_interval,
            initial_refreshes=args.initial_refreshes,
            averaging=ah.conv_spatial_average() if args.conv_average else None,
            weight_decay=args.weight_decay,
        ),
        "Newton": ah.newton(
            rate if rate is None else schedule,
            LOSS,
            schedule=schedule if rate is None else None,
            weight_decay=args.weight_decay,
            seed=args.seed,
        ),
    }
