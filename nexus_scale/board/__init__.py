"""`nexus board`: all runs of a root as pages that stay fresh; read-only.

`watch` reads the folders, again only what has changed; `pages` makes parts of pages of it, of a run the same as report.html has; `server`
answers with those parts that a browser does not have yet.
"""
