"""Who may ask, and how much: keys, their limits, CORS, and where may be listened without any.

Read config.py, keys.py (a key, its hash, the file of them), key_file.py (which follows that file), limits.py (what
each key has used), counter.py (one count for all ingresses) and middleware.py, which every request meets first.
listening.py keeps a server without keys on the loopback interface. Nothing of it knows a model or a stage.
"""
