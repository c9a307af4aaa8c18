"""What renders results, for a person and for a machine. Nothing else prints."""
