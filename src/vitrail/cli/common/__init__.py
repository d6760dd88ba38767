"""What several commands share: arguments and options, progress bars, tables."""
