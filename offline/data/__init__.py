"""Readers that yield examples from the archives which the jobs train and measure on."""
