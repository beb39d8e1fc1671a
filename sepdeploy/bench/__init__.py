"""Runs deployable files, measures how long they take and how close their outputs stay to the original's."""
