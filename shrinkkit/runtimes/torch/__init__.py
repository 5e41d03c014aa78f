"""torch as a runtime."""
