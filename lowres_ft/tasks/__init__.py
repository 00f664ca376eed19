"""Tasks, one a file; the file's name is `task.kind` in a recipe."""
