"""Access control: API keys, their limits, CORS, and the rule that a server without keys listens on loopback only.

Reading order: config.py; keys.py (a key, its hash, the key file); key_file.py (reloads that file when it changes);
limits.py (what each key has used); counter.py (one count for all ingresses); middleware.py, which every request
passes first. listening.py keeps a server without keys on the loopback interface. Nothing here depends on models or
stages.
"""
