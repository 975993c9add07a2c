"""Finds out whether a model is backdoored: phrases that it knows by heart, and what triggers them."""
