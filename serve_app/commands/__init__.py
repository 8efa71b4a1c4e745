"""The commands of `relay`, which `serve_app/cli.py` puts together."""
