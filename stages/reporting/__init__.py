"""Tables and pictures of what the stages made."""
