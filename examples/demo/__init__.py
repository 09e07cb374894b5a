"""The main job: real models on real data over emulated hosts, and the parts its benchmark shares.

`python -m examples.demo` (from the repository root) runs it; `make demo` does the set-up first.
"""
