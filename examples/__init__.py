"""Small programs that show how a method works."""
