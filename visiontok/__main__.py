"""`python -m visiontok`."""

from visiontok.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
