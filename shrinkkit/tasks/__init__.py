"""What is compressed and how it is judged: tasks, their checks, and the bundled ones."""
