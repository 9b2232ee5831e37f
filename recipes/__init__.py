"""What the quickstart does, as commands: one module a data set."""
