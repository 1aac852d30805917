"""Pages that this machine serves: who may see them, what may run on them, and the server.

`access.Access` says where to listen and who is let in, `pages` what files a page is made of, `server.serve` runs an application until it
is told to stop. A page is plain HTML, a style sheet and JavaScript modules in the package: no build step, nothing from elsewhere.
"""
