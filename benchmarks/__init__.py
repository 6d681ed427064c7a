"""What a private step costs beside an ordinary one."""
