"""The command line: one module a command, one for shared options, one for output."""
