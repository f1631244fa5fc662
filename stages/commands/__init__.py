"""Options of the command line, parameters, and commands that are no stages; light to import."""
