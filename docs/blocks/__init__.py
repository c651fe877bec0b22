"""What the pages show of the code and of the results, as Markdown. `python docs/fill.py` puts it into the pages."""
