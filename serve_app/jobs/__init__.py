"""Jobs: videos and pictures that are made in the background, and outlive whatever makes them.

Read in this order: `config`, what a user may say; `job`, what is known of one; `store`, their rows (SQLAlchemy),
and `files`, what goes in and comes out (fsspec); `jobs`, both as an event loop sees them; `desk`, which takes jobs
in, with their `body`; `runner`, which takes them up by `leases` and has them drawn (`drawing`); `routes`, the HTTP
of it, with `objects`, what clients see, and `content`, a file as an answer.
"""
