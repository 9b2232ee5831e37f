"""Processes, snapshots, training states and statistics: what needs torch and no network."""
