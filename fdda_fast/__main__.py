"""`python -m fdda_fast`."""

from .cli import main

if __name__ == "__main__":
    main()
