"""Encoder families, one module each; `perception.catalogue.load_encoder` is the way in."""
