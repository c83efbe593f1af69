"""Measures on a sample of stored images what protection is left after purification."""
