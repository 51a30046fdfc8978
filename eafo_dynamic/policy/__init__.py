"""Who moves the amplitudes, when, and how far."""

from eafo_dynamic.policy.policies import (
    Entropy,
    Frozen,
    Hybrid,
    Learned,
    Observe,
    Policy,
    Rule,
    Static,
    make_policy,
    make_rules,
)

__all__ = ["Entropy", "Frozen", "Hybrid", "Learned", "Observe", "Policy", "Rule", "Static", "make_policy", "make_rules"]
