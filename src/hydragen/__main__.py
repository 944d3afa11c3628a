"""`python -m hydragen` is the command line; without the extra `cli` it says what is missing."""

from hydragen.cli import app  # noqa: TID251  (the ban is for the library below; this is the console script)

if __name__ == "__main__":
    app(prog_name="hydragen")
