"""Checks of what only a GPU can show, in order of value: `python -m benchmarks.gpu`, or `make gpu`."""
