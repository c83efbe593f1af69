"""Measures the embedded reference models: can they stand for real ones when protections are tried on them?"""
