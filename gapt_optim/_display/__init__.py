"""What a page, a table and a picture are made of, for runs and for models alike."""
