"""Foldbus against the fastest hand-written code that does the same job, in one run. README.md has what came out."""
