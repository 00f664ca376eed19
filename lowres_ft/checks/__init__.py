"""What can be wrong with data: a family of findings a file, found by the registry."""
