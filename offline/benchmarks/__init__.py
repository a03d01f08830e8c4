"""Evaluators: each is run on an encoder and yields `(metric, value)`; none knows how the encoder was made."""
