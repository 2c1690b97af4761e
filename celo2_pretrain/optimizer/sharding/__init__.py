"""Where the elements of each tensor lie among the ranks."""
