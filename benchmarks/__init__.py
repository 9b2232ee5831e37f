"""The measurements behind all claims of speed: `python -m benchmarks` compares our code with a plain form of it."""
