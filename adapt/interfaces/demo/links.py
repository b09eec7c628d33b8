"""What a lossy codec really did to the activations: every link of every image once more, and the error of each.

Run as `python -m adapt.interfaces.demo.links` (see runtime/child.py). The stages, the codec and the numeric class are the cluster's, so
the activations are the cluster's too: whoever asks holds the final outputs against the answers that came over the network, and if they
are bit-identical, the errors measured here are those that happened there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adapt.interfaces.demo.reference import IMAGES_FILE
from adapt.protocol.codecs import decode, encode
from adapt.runtime.child import Progress, answer, ask

REPLAYED_FILE = "replayed.npy"


@dataclass(slots=True)
class Link:
    """All tensors that left one stage (counted from 1), over all images. Errors are absolute, in the units of the tensors.

    `worst_share`: the largest error as a share of the bound that was promised for that very tensor; `worst_error` and `worst_bound`
    belong to that tensor. `worst_std_share`: the largest error as a share of its tensor's standard deviation, as the tolerance is given.
    """

    stage: int
    tensors: int = 0
    lossy_tensors: int = 0
    raw_bytes: int = 0
    sent_bytes: int = 0
    worst_share: float = 0.0
    worst_error: float = 0.0
    worst_bound: float = 0.0
    worst_std_share: float = 0.0
    codecs: list[str] = field(default_factory=list)

    def note(self, sent: np.ndarray[Any, Any], arrived: np.ndarray[Any, Any], codec: str, bound: float, sent_bytes: int) -> None:
        self.tensors += 1
        self.raw_bytes += sent.nbytes
        self.sent_bytes += sent_bytes
        if codec not in self.codecs:
            self.codecs.append(codec)
        if bound == 0:  # travelled lossless; that it did is checked as well
            self.worst_share = self.worst_share if np.array_equal(sent, arrived, equal_nan=sent.dtype.kind == "f") else float("inf")
            return
        self.lossy_tensors += 1
        wide = sent.astype(np.float64)
        error = float(np.max(np.abs(arrived.astype(np.float64) - wide)))
        self.worst_std_share = max(self.worst_std_share, error / float(wide.std()))
        if not error / bound <= self.worst_share:  # said so, because no comparison with NaN is true
            self.worst_share, self.worst_error, self.worst_bound = error / bound, error, bound


@dataclass(frozen=True, slots=True)
class Replay:
    links: list[Link]
    outputs: np.ndarray[Any, Any]  # (count, 1, classes): what must equal the cluster's answers


async def replay(
    stages: Sequence[Path], *, codec: str, tolerance: float | None, count: int, threads: int, directory: Path, progress: Progress
) -> Replay:
    """Run `count` images of the reference's directory through the stages, with the codec after each, in a new process.

    Args:
        stages: the files that the workers ran, in order.
        directory: where `compute_reference` has left the images.
    """
    request = {
        "stages": [str(path) for path in stages],
        "codec": codec,
        "tolerance": tolerance,
        "count": count,
        "threads": threads,
        "directory": str(directory),
    }
    told = await ask("adapt.interfaces.demo.links", request, about="the measurement of the links", progress=progress)
    return Replay([Link(**link) for link in told["links"]], np.load(directory / REPLAYED_FILE))


def _replay(request: dict[str, Any], say: Progress) -> dict[str, Any]:
    """The child's half."""
    say("loading torch", None)
    import torch

    from adapt.models.interpreter import Stage

    torch.set_num_threads(request["threads"])
    torch.set_num_interop_threads(1)
    directory, count = Path(request["directory"]), request["count"]
    images = np.load(directory / IMAGES_FILE)
    stages = [Stage.load(path) for path in request["stages"]]
    links = [Link(number) for number in range(1, len(stages) + 1)]
    outputs = []
    for index in range(count):
        leaves: list[Any] = [torch.from_numpy(images[index])]  # clients send inputs lossless
        for stage, link in zip(stages, links, strict=True):
            leaves = [_over_the_link(leaf, link, request) for leaf in stage.run(leaves)]
        outputs.append(leaves[0].numpy())
        say(f"image {index + 1} of {count}", (index + 1) / count)
    np.save(directory / REPLAYED_FILE, np.stack(outputs))
    return {"links": [asdict(link) for link in links]}


def _over_the_link(leaf: Any, link: Link, request: dict[str, Any]) -> Any:
    """The leaf as the next stage gets it."""
    import torch

    if not isinstance(leaf, torch.Tensor):
        return leaf
    sent = leaf.numpy()
    header, payload = encode(sent, codec=request["codec"], tolerance=request["tolerance"])
    arrived = decode(header, payload, limit_bytes=max(sent.nbytes, 1))
    link.note(sent, arrived, header.codec, header.bound, len(payload))
    return torch.from_numpy(arrived)


if __name__ == "__main__":
    sys.exit(answer(_replay))
