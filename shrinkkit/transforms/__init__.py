"""Pruning, fine-tuning, and variants on disk."""
