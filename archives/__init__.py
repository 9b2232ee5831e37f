"""Image archives: reading, writing and building them, their labels, and batches from them."""
