"""ADAPT: neural networks over clusters of small, unequal, unreliable machines.

    import adapt

    with adapt.LocalCluster(workers=3) as cluster, adapt.Client(cluster.address) as client:
        model = client.deploy("torchvision/resnet50", seed=0)
        y = model(x)

Importing this needs no torch.
"""

from adapt.emulation.cluster import EmulatedCluster
from adapt.errors import (
    AdaptError,
    AttemptTimeoutError,
    CanaryError,
    ConfigError,
    ConnectError,
    DeadlineExceededError,
    DisagreementError,
    ExportError,
    ExportInterruptedError,
    ExportUnavailableError,
    InputMismatchError,
    ModelError,
    OverloadedError,
    PlanError,
    PoisonError,
    StageNotResidentError,
    UnknownModelError,
    VersionError,
    WireError,
    WorkerLostError,
)
from adapt.runtime.async_client import AsyncClient, AsyncInferFuture, AsyncModel
from adapt.runtime.client import Client, Model
from adapt.runtime.conversation import InferFuture, Outcome
from adapt.runtime.local import LocalCluster
from adapt.version import VERSION as __version__

__all__ = [
    "AdaptError",
    "AsyncClient",
    "AsyncInferFuture",
    "AsyncModel",
    "AttemptTimeoutError",
    "CanaryError",
    "Client",
    "ConfigError",
    "ConnectError",
    "DeadlineExceededError",
    "DisagreementError",
    "EmulatedCluster",
    "ExportError",
    "ExportInterruptedError",
    "ExportUnavailableError",
    "InferFuture",
    "InputMismatchError",
    "LocalCluster",
    "Model",
    "ModelError",
    "Outcome",
    "OverloadedError",
    "PlanError",
    "PoisonError",
    "StageNotResidentError",
    "UnknownModelError",
    "VersionError",
    "WireError",
    "WorkerLostError",
    "__version__",
]
