"""From a denoiser to images: per-seed randomness, samplers, guidance, and where the images go."""
