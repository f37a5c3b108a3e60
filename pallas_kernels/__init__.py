"""Array operations of a decode step, each with a definition and the implementations that run it fast.

Pure functions on arrays: no models, no tokens. An operation is a folder holding `api.py` (call this one),
`reference.py` (the definition) and one file per implementation.
"""
