"""`python -m lowres_ft`."""

from lowres_ft.cli.main import main

main()
