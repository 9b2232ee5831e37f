"""Processes, snapshots, training states and statistics. Nothing here knows a particular network or method."""
