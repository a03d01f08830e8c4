"""The operator's console: pages over the API, in the name of who has signed in.

Owns sessions, forms and pages. It asks the API of the same process through the project's own client, so it can do
nothing that the API does not allow its caller, and what it does is limited, recorded and refused as that is.
"""
