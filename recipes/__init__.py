"""What the quickstart and the benchmark do, as commands: one module a data set.

`advice` holds the commands for the user's own set.
"""
