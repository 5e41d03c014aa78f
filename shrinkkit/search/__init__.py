"""The search for the best recipe within a budget, by measuring files on a target."""
