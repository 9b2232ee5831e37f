"""What is learned and how: data, noise levels, networks, objectives, and the one training loop."""
