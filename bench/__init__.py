"""Measurements: one file per question. Run from the root, as `python -m bench.dispatch --quick`; `--help` lists what else can be said.

Figures and pictures go to bench-results/. `pip install -e .[bench]` brings what they need, `.[bench-peers]` the systems to compare with.
"""
