"""For all Python tests."""

import signal

# A job that a shell without job control starts in the background ignores SIGINT, and so would every
# program of the tests, some of which are ended by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
