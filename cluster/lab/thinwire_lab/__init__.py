"""Several hosts on one machine, joined by links of a stated speed (see lab.py)."""

from thinwire_lab.errors import LabError, NoNamespaceError
from thinwire_lab.job import Job
from thinwire_lab.lab import Lab, Status, bring_up, down
from thinwire_lab.link import Rate

__all__ = ["Job", "Lab", "LabError", "NoNamespaceError", "Rate", "Status", "bring_up", "down"]
