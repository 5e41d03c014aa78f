"""A run folder read: rows, verdict, diagnosis and model cards."""
