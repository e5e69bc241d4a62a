"""Side-by-side measurements. `python -m benchmarks` runs them all; run from the repository's root.

A benchmark reports; it never fails because a figure is slow. It does fail if what it measured is wrong: an
output that a LoRA did not change, a base that is not what it was.
"""
