"""What several recipes measure the same way: a module a task, with its data, its models, and its scores.

A track knows no method: a recipe gives it a model and gets batches, quality and bytes. None is a recipe.
"""
