"""What the speed claims are made of: `python -m benchmarks` measures ours against the plain form, in one run."""
