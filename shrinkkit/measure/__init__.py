"""Latency, accuracy, memory and verification of model files."""
