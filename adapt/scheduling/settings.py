"""The numbers that the scheduler goes by; each is a setting of the dispatcher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from adapt.config import DispatcherConfig
from adapt.scheduling.qos import QosSettings
from adapt.scheduling.tokens import TokenSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """All durations in seconds."""

    policy: str = "earliest-finish"
    silence_s: float = 2.0  # without a heartbeat for so long, a worker is suspect
    grace_s: float = 2.0  # without a connection for so long, a worker is lost
    attempt_timeout_s: float = 20.0  # until it is known what is usual; never longer
    min_attempt_timeout_s: float = 2.0
    load_timeout_s: float = 60.0  # without progress
    spares: int = 1  # workers that have each stage ready besides those that run it, where memory allows
    client_grace_s: float = 10.0  # without a connection for so long, a client's requests are cancelled
    relief_s: float = 5.0  # so often, while there are requests, it is looked whether a slow worker needs help
    cooldown_s: float = 0.0  # a worker that was given a task gets no other for so long
    hedge_share: float = 0.05  # of tasks that may be given to a second worker because the first is slower than usual
    verify_share: float = 0.0  # of tasks whose answers are believed only when another worker has come to the same bits
    max_failures: int = 8  # of one stage of one request, losses included
    max_budget_s: float = 3600.0
    max_requests: int = 4096
    max_retained_bytes: int = 2 << 30
    max_kept_bytes: int = 256 << 20
    qos: QosSettings = field(default_factory=QosSettings)
    tokens: TokenSettings = field(default_factory=TokenSettings)

    @classmethod
    def of(cls, config: DispatcherConfig) -> Self:
        """What the dispatcher was told."""
        return cls(
            policy=config.policy,
            silence_s=config.silence_s,
            grace_s=config.grace_s,
            client_grace_s=config.client_grace_s,
            attempt_timeout_s=config.attempt_timeout_s,
            min_attempt_timeout_s=min(config.min_attempt_timeout_s, config.attempt_timeout_s),
            load_timeout_s=config.load_timeout_s,
            spares=config.spares,
            max_budget_s=config.max_budget_s,
            max_requests=config.max_requests,
            max_retained_bytes=config.max_retained_bytes,
            max_kept_bytes=config.max_kept_bytes,
            qos=QosSettings(
                failure_penalty=config.failure_penalty,
                success_factor=config.success_factor,
                open_above=config.breaker_above,
                decay_per_s=config.breaker_decay,
            ),
            hedge_share=config.hedge_share,
            verify_share=config.verify_share,
            cooldown_s=config.cooldown_s,
            relief_s=config.relief_s,
            tokens=TokenSettings(most=config.retry_tokens, per_request=config.retry_tokens_per_request, per_s=config.retry_tokens_per_s),
        )
