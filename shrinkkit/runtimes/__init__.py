"""What runs a model file: building, loading and inspecting files for each runtime."""
