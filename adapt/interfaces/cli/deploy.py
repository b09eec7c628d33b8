"""adapt deploy: make a model available that the dispatcher's side can build, or that lies in a file here."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from adapt.config import counted
from adapt.errors import ConfigError
from adapt.interfaces.cli import clients
from adapt.interfaces.cli.doors import OK
from adapt.models.program import OPTIMIZE
from adapt.protocol.codecs import CODECS
from adapt.protocol.messages import DeploymentRecord

FILE_HELP = "the path of a .pt2 file, which torch.export.save wrote; reading one runs what is in it, so trust it"


def add_to(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "deploy",
        help="make a model available",
        description="Export a model beside the dispatcher, or a .pt2 file on this machine, cut it into stages and load them on the workers.",
    )
    parser.add_argument("model", metavar="MODEL", help=f"a torchvision model, for instance torchvision/resnet50, or {FILE_HELP}")
    parser.add_argument("--name", help="name of the deployment (default: the model's)")
    parser.add_argument("--version", type=int, help="number of the version, above all that there were (default: the next)")
    parser.add_argument("--stages", default="auto", help="number of stages (default: auto, what should be fastest)")
    parser.add_argument("--codec", default="auto", help=f"of activations: auto or {', '.join(CODECS)} (default: auto)")
    parser.add_argument("--tolerance", type=float, help="largest error on a link, as a share of the tensor's standard deviation")
    parser.add_argument("--numerics", choices=("auto", "exact", "close"), default="auto", help="exact: one numeric class for each request")
    add_optimize(parser)
    parser.add_argument("--weights", help="torchvision's own by name (DEFAULT), or a file under the dispatcher's --models-dir")
    add_model_options(parser)
    clients.add_options(parser)
    return parser


def add_optimize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--optimize",
        choices=OPTIMIZE,
        default="none",
        help="fold: batch norms folded, channels last; faster, last bits differ (default: none)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What a torchvision model is built with, besides its weights; a file brings all that."""
    parser.add_argument("--seed", type=int, help="of random weights, when no weights are given")
    parser.add_argument("--model-args", metavar="JSON", default="{}", help="arguments of the model's constructor: '{\"num_classes\": 10}'")
    parser.add_argument(
        "--input-shape", metavar="SIZES", help="sizes with commas, with batch or without: 3,96,96 (default: the model's own)"
    )


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    stages, shape, arguments = _stages(options.stages), read_shape(options.input_shape), read_arguments(options.model_args)
    console = Console(file=sys.stderr)
    with clients.connected(options, environ) as client:

        def told(words: str) -> None:
            console.print(f"{words} ...", style="dim", highlight=False, markup=False)

        model = client.deploy(
            options.model,
            stages=stages,
            codec=options.codec,
            tolerance=options.tolerance,
            numerics=None if options.numerics == "auto" else options.numerics,
            optimize=options.optimize,
            weights=options.weights,
            seed=options.seed,
            model_args=arguments,
            input_shape=shape,
            name=options.name,
            version=options.version,
            progress=told,
        )
    print_deployed(model.record)
    return OK


def print_deployed(record: DeploymentRecord) -> None:
    """One line for people and scripts."""
    places = "; ".join(f"{number}: {', '.join(stage.workers)}" for number, stage in enumerate(record.stages, start=1))
    again = f", which is version {record.again} again," if record.again else ""
    print(f"deployed {record.name} version {record.version}{again} in {counted(len(record.stages), 'stage')} ({places})")


def _stages(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= 4096:
        raise ConfigError(f"stages={text[:32]!r}: expected auto, or a number from 1 to 4096")
    return int(text)


def read_shape(text: str | None) -> list[int] | None:
    if text is None:
        return None
    sizes = text.split(",")
    if not all(size.strip().isascii() and size.strip().isdigit() for size in sizes):
        raise ConfigError(f"input-shape={text[:64]!r}: expected sizes with commas, for instance 3,224,224")
    return [int(size) for size in sizes]


def read_arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"model-args={text[:64]!r}: not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ConfigError(f'model-args={text[:64]!r}: expected a JSON object, for instance {{"num_classes": 10}}')
    return arguments
