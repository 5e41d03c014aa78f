"""Recipes, studies, targets, and the records of what was made and measured."""
