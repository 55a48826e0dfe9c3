"""Ionian's side of a container: a thin launcher around the official client's own runtime.

The runtime (`modal._container_entrypoint`) does the work: it imports the user's code, runs lifecycle hooks and talks to
the platform. This package only starts it (`launcher`) and, for web functions, also serves the app that the runtime has
built over plain HTTP, so that a request does not have to travel through the runtime's data channel (`web_hook`).

It never edits or replaces the user's packages, imports nothing outside the standard library until a web app is about
to be served, and whatever goes wrong in it leaves the runtime as it is.
"""
