"""The command line: parsing, checking and one-line errors."""
