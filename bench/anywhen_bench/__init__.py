"""Side-by-side measurements of Anywhen. One module per job; see bench/README.md for what the figures mean."""
