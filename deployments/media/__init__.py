"""Images and videos as files: input videos, outputs, and where outputs are written."""
