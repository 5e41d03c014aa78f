"""Plan and run the steps of a study."""
