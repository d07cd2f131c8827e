"""What a run tells its user: the head, live progress, the summary; and the trackers."""
