"""``thinwire top``: a running job, from its run log. Needs no torch.

command does what the command line says, job keeps what the log's lines say, screen shows it,
keyboard reads the keys.
"""
