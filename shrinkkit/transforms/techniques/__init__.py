"""Techniques besides pruning and fine-tuning: low rank, depth, equalization, distillation."""
