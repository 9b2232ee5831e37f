"""Where the host may wait for a GPU in a step, and where it may multiply in float64: (file, function) -> reason."""

__all__ = ["DOUBLE", "WAITS"]

WAITS = {
    ("archives/dataset.py", "_order"): "the order of an epoch travels once per epoch",
    ("sampling/arrival.py", "wait"): "files need the images; the GPU already has the next batch",
    ("sampling/ddgan.py", "ddgan_sampler"): "the constants of the steps travel once, then they are cached",
    ("sampling/generation.py", "generate_images"): "the wanted classes travel once, before the first batch",
    ("training/augment.py", "_resampling"): "the filters travel once per image size, then they are cached",
    ("training/objectives/pair_passes.py", "read"): "TDSM's number of pairs decides how many passes follow; the copy "
    "began before the pass with gradients, so the GPU has work meanwhile",
}

DOUBLE = {
    ("training/objectives/classifier.py", "noisy_log_probs"): "small probabilities stay exact, only [n,C] x [C,C]",
    ("training/objectives/tdsm.py", "clean_posterior"): "an ill-conditioned inverse of T, only [n,C] x [C,C]",
}
