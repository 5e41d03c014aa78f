"""Live outputs and controls in notebooks."""
