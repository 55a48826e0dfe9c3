"""A module that cannot be imported."""

import modal

app = modal.App("broken")

raise ZeroDivisionError("this module is broken")
