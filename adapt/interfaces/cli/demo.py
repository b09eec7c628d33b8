"""adapt demo: a model split over processes that die, and all answers right."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapt.errors import ConfigError
from adapt.interfaces.cli.doors import FAILED, OK
from adapt.protocol.codecs import CODECS

DEFAULT_TOLERANCE = 0.01
ABOUT = """\
Start a dispatcher and workers on this machine, deploy a model cut into stages, and stream real images through it. On the way one worker
is killed and another is stopped. All answers are held against the model's own, computed by torchvision in a process of its own.
"""


def add_to(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo", help="see a model survive its workers, on this machine", description=ABOUT
    )
    parser.add_argument("--model", default="torchvision/resnet50", help="a torchvision classification model (default: %(default)s)")
    parser.add_argument("--images", metavar="DIR", type=Path, help="folder of pictures (default: photographs from scikit-image)")
    parser.add_argument("--count", metavar="N", type=int, default=64, help="images to send (default: %(default)s)")
    parser.add_argument("--workers", metavar="N", type=int, default=4, help="worker processes (default: %(default)s)")
    parser.add_argument("--stages", metavar="N", type=int, help="stages that the model is cut into (default: one per worker)")
    parser.add_argument("--in-flight", metavar="N", type=int, default=8, help="images under way at a time (default: %(default)s)")
    parser.add_argument("--codec", default="raw", help=f"of activations: {', '.join(CODECS)} (default: %(default)s)")
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"largest error on a link, as a share of the tensor's standard deviation (default for zfp: {DEFAULT_TOLERANCE:g})",
    )
    parser.add_argument(
        "--weights", help="a file of weights, or torchvision's own by name (DEFAULT), which are downloaded (default: random)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of random weights (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write all figures to a file")
    parser.add_argument(
        "--membership",
        choices=("embedded", "etcd"),
        default="embedded",
        help="who keeps the leases; etcd: a real server is started, and killed and started again on the way (default: %(default)s)",
    )
    parser.add_argument("--no-faults", action="store_true", help="let every worker live")
    return parser


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Exit status 1 when anything is not as promised."""
    for package in ("torch", "torchvision"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"the demo needs {package}: install adapt-inference[demo]")
    from adapt.interfaces.demo.screen import Screen
    from adapt.interfaces.demo.show import Wishes, show

    tolerance = options.tolerance
    if tolerance is None and options.codec.startswith("zfp"):
        tolerance = DEFAULT_TOLERANCE
    wishes = Wishes(
        model=options.model,
        weights=options.weights,
        seed=options.seed,
        folder=options.images,
        count=options.count,
        workers=options.workers,
        stages=options.workers if options.stages is None else options.stages,
        codec=options.codec,
        tolerance=tolerance,
        in_flight=options.in_flight,
        has_faults=not options.no_faults,
        membership=options.membership,
    )
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(f"json={str(options.json)!r}: there is no such folder")
    figures = show(wishes, Screen())
    if options.json is not None:
        options.json.write_text(json.dumps(figures.to_plain(), indent=1) + "\n", encoding="utf-8")
    return FAILED if figures.problems else OK
