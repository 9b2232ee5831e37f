"""Metrics of generated images: pure functions features -> number, and the table made of them (`fid.py evaluate`)."""
