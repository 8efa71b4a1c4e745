"""The pages at `/` and `/docs`: plain HTML, CSS and ES modules in `files/`, as the browser loads them.

`routes.py` serves them. Reading order in `files/`: index.html, main.js, and then its imports: models.js (the
cards), form.js, adapters.js, inputs.js and brush.js (input images), pictures.js and videos.js (a running request),
result.js (finished images), and below them all server.js, key.js and elements.js. docs.html and docs.js are the
other page.
"""
