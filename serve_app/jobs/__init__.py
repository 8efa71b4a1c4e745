"""Jobs: videos and images that are made in the background and survive the death of the processes that make them.

Reading order: `config`, the settings; `job`, the data of one job; `database` and `store`, the rows (SQLAlchemy),
and `files`, the input and output files (fsspec); `jobs`, both of these for callers on an event loop; `intake`,
which accepts jobs, with `body`, the request as it is stored; `runner`, which takes jobs by `leases` and runs them
(`drawing`); `metrics`; `routes`, the HTTP API, with `objects`, what clients see, and `content`, a file as a
response.
"""
