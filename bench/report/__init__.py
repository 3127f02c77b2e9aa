"""Reports of stored sessions: one page, a summary, a picture, and comparisons."""
