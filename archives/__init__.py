"""Image archives: read and write them, build them from other sources, draw batches from them; label noise."""
