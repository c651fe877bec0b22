"""What the method does: seeds x methods x settings, statistics, committed results. See README.md here."""
