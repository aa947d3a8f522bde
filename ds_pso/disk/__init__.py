"""A checkpoint on disk: its files and records, how they get there, which one is whole, one particle of it."""
