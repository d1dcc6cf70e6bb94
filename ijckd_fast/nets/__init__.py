"""Backbones by name, their taps, their weights, what they cost."""
