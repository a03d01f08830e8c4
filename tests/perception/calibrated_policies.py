"""A calibrated policy for tests, of which every figure can be told apart."""

from typing import Any

from perception.policy_file import CalibratedPolicy, FlipBin, Measured, Rate, Rates, Targets
from perception.verdict import DecisionPolicy, VerdictLabel


def a_policy(**changes: Any) -> CalibratedPolicy:
    """One with bins for `safe` under two settings and for `unsafe` under one."""
    clean = Rates(Rate(1, 100), Rate(2, 120), Rate(3, 100), Rate(4, 120))
    attacked = Rates(Rate(5, 100), Rate(6, 120), Rate(7, 100), Rate(8, 120))
    safe, unsafe = VerdictLabel.SAFE, VerdictLabel.UNSAFE
    values: dict[str, Any] = {
        "policy": DecisionPolicy("vote", 3, -1.0, 0.05, 0.02),
        "name": "toy, linf 8/255, 10 steps",
        "encoder_fingerprint": "an encoder",
        "gallery_sha256": "ab" * 32,
        "attacked_under": "nearest-000000000000",
        "norm": "linf",
        "eps": 8 / 255,
        "steps": 10,
        "targets": Targets(0.05, 0.1),
        "rates": Measured(clean, attacked),
        "cross_validated": Measured(attacked, clean),
        "flips": (
            FlipBin("linf", 4 / 255, 10, safe, 0.05, 0.2, 10, 20),
            FlipBin("linf", 4 / 255, 10, safe, 0.2, 0.5, 2, 25),
            FlipBin("linf", 8 / 255, 10, safe, 0.05, 0.5, 30, 45),
            FlipBin("linf", 4 / 255, 10, unsafe, 0.0, 0.3, 0, 21),
        ),
    }
    return CalibratedPolicy(**{**values, **changes})
