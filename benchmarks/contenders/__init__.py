"""One family of contenders a file: `run(job, clock)` works to the last step and returns what it made."""
