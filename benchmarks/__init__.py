"""What a step costs (`cost`) and what the method does (`evidence`)."""
