"""The command line's parts beside the stages: options, and commands that look at what the stages made. Light to import."""
