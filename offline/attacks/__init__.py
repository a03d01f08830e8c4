"""Attacks on encoders: each maximises an objective within a threat model."""
