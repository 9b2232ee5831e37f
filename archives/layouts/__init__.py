"""Data sets in the layouts in which they are published: one file per family, each of which returns a `Source`."""
