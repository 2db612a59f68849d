"""Inputs of the exercises, one file a chapter.

A class has the name of an exercise. Each of its checks is a function from an `Rng` (see
tests/checking.py) to a list of inputs; `run` gives them to the module under test, and returns what
is compared with the reference. A check may have its own, `run_<check>`.

These files run beside the answers, so they import torch and the standard library, and hold no
solution and no expected number.
"""
