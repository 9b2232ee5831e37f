"""Reports that people look at: pages, tables and pictures that compare methods."""
