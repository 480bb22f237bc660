"""What every store promises about commits. The rules are written down at the tests; no adapter has its own."""
