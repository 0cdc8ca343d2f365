"""`python -m proofcheck`."""

from proofcheck.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
