"""The console: one page, and what draws its samples."""
