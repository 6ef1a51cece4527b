"""The measuring instruments behind `lemo bench`: what they run, and the records they write."""
