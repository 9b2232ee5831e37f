"""Small programs that show what a method does."""
