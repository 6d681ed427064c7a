"""What a run leaves on the disk, and the process that it runs in."""
