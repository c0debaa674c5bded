"""Example configurations: files of Python assignments for train.py."""
