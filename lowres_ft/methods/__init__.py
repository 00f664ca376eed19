"""Fine-tuning methods, one a file; the file's name is `method.kind` in a recipe."""
