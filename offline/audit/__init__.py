"""Robustness audits of the decision that is deployed: plans, attacks on it, records, figures, reports."""
