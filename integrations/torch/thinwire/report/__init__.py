"""``thinwire report``: run logs as tables, pictures and one JSON file. Needs no torch.

command does what the command line says, run_log reads the files, runs derives the figures, tables
and plots show them.
"""
