"""Tasks: models with data, score and loss; their checks, loading, and the bundled ones."""
