"""Finding wrong labels in a data set."""
