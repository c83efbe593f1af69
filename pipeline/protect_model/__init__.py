"""Protects a model instead of images: reads concepts, runs a model protector, writes a model folder."""
