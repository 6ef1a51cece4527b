"""The command line. It parses, calls, and prints; what it calls does the work."""
