"""`make demo`: a whole federation on one laptop, over real HTTP, on real data."""
