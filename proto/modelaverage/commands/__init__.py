"""What several commands share: flags, and text for a terminal."""
