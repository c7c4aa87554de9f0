"""`python -m fastbyol` is the same program as the `fastbyol` command."""

from fastbyol.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
