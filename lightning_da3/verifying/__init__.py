"""Does the converted network compute what the user's computes? Runs both; edits neither."""
