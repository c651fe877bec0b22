"""One small module per training framework, and the trackers. Nothing else imports a framework."""
