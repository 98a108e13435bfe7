"""Measuring a reducer honestly: accuracy, interleaved timing, sweeps and their result store.

Nothing is imported here: `visiontok.bench.results` and `visiontok.bench.schema` need only the standard library, the
other modules import torch when they are imported themselves.
"""
