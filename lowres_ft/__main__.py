"""`lowres-ft`, and `python -m lowres_ft`."""

from lowres_ft import allocator, stopping


def main() -> None:
    """Run the command line, in a process whose malloc sets no small blocks aside."""
    allocator.restart()
    stopping.install()  # a signal while libraries are imported ends the process without a traceback
    from lowres_ft.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
